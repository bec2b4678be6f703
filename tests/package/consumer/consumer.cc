// The same headers and library seen from C++: names link, structs initialise, errors come back as values.
#include <cumoe/cumoe.h>

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

namespace
{

void check(cumoe_status_t status)
{
    if (status != CUMOE_SUCCESS) throw std::runtime_error(cumoe_last_error());
}

struct Destroy {
    void operator()(cumoe_handle_t *handle) const
    {
        cumoe_handle_destroy(handle);
    }
    void operator()(cumoe_layer_t *layer) const
    {
        cumoe_layer_destroy(layer);
    }
};

} // namespace

int main()
{
    cumoe_handle_t *opened = nullptr;
    check(cumoe_handle_create(&opened, CUMOE_BACKEND_CPU, 0));
    const std::unique_ptr<cumoe_handle_t, Destroy> handle(opened);

    cumoe_config_t config;
    check(cumoe_config_init(&config));
    config.hidden_size = 16;
    config.intermediate_size = 32;
    config.num_experts = 4;
    config.top_k = 2;
    cumoe_layer_t *made = nullptr;
    check(cumoe_layer_create(&made, handle.get(), &config));
    const std::unique_ptr<cumoe_layer_t, Destroy> layer(made);

    std::size_t workspace_size = 0;
    check(cumoe_layer_buffer_sizes(layer.get(), 8, &workspace_size, nullptr));

    config.top_k = 5;
    try {
        check(cumoe_layer_create(&made, handle.get(), &config));
        return 1;
    } catch (const std::runtime_error &error) {
        std::printf("workspace of 8 tokens: %zu bytes; top_k = 5: %s\n", workspace_size, error.what());
    }
    return std::vector<int>{cumoe_version()}.front() == CUMOE_VERSION ? 0 : 1;
}
