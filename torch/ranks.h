// Groups of ranks (cumoe/parallel.h) and what belongs to one: its layers, and the plans of calls in flight. Python
// knows both by numbers, so that what is closed is found to be closed.
#ifndef CUMOE_TORCH_RANKS_H
#define CUMOE_TORCH_RANKS_H

#include "tensors.h"

#include <memory>

namespace cumoe_torch
{

// What a map has under a number, or nothing, without holding the mutex when it comes to an end.
template <typename Value>
std::shared_ptr<Value> take_out(std::map<int64_t, std::shared_ptr<Value>> &map, std::mutex &mutex, int64_t number)
{
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = map.find(number);
    if (found == map.end()) return nullptr;
    std::shared_ptr<Value> taken = std::move(found->second);
    map.erase(found);
    return taken;
}

// Of one forward call, until its last backward call.
struct Plan {
    cumoe_ep_plan_t *plan = nullptr;
    Maybe routing;
    cumoe_ep_sizes_t sizes = {};

    explicit Plan(const cumoe_layer_t *layer)
    {
        check(cumoe_ep_plan_create(layer, &plan));
    }
    Plan(const Plan &) = delete;
    Plan &operator=(const Plan &) = delete;
    ~Plan()
    {
        cumoe_ep_plan_destroy(plan);
    }
};

class Group
{
  public:
    const Device device;
    cumoe_ep_t *const ep;

    Group(const Device &device_, cumoe_ep_t *ep_) : device(device_), ep(ep_) {}
    Group(const Group &) = delete;
    Group &operator=(const Group &) = delete;
    ~Group()
    {
        const DeviceGuard guard = device.guard();
        plans.clear();
        for (const auto &layer : layers) cumoe_layer_destroy(layer.second);
        cumoe_ep_destroy(ep);
    }

    // To make one is a call of all ranks. Their numbers of threads may differ, and change: it keeps its first one.
    const cumoe_layer_t *layer(const cumoe_config_t &config)
    {
        LayerKey key = {config, device};
        key.config.max_threads = 0;
        std::lock_guard<std::mutex> lock(layers_mutex);
        cumoe_layer_t *&layer = layers[key];
        if (!layer) check(cumoe_layer_create(&layer, find_handle(device), &config));
        return layer;
    }

    // Python forgets plans whenever it likes, also within a call that waits for others: nobody waits with this
    // mutex.
    std::shared_ptr<Plan> plan(int64_t number, const cumoe_layer_t *layer)
    {
        std::lock_guard<std::mutex> lock(plans_mutex);
        std::shared_ptr<Plan> &plan = plans[number];
        if (!plan) plan = std::make_shared<Plan>(layer);
        return plan;
    }

    void forget(int64_t number)
    {
        take_out(plans, plans_mutex, number);
    }

    int64_t num_plans()
    {
        std::lock_guard<std::mutex> lock(plans_mutex);
        return static_cast<int64_t>(plans.size());
    }

  private:
    std::mutex layers_mutex, plans_mutex;
    Layers layers;
    std::map<int64_t, std::shared_ptr<Plan>> plans;
};

class Groups
{
  public:
    static Groups &all()
    {
        static auto &groups = *new Groups;
        return groups;
    }

    int64_t add(std::shared_ptr<Group> group)
    {
        std::lock_guard<std::mutex> lock(mutex);
        groups[++last] = std::move(group);
        return last;
    }

    // NULL where it is closed.
    std::shared_ptr<Group> find(int64_t number)
    {
        std::lock_guard<std::mutex> lock(mutex);
        const auto found = groups.find(number);
        return found == groups.end() ? nullptr : found->second;
    }

    void remove(int64_t number)
    {
        take_out(groups, mutex, number);
    }

  private:
    std::mutex mutex;
    std::map<int64_t, std::shared_ptr<Group>> groups;
    int64_t last = 0;
};

inline std::shared_ptr<Group> find_group(int64_t number)
{
    std::shared_ptr<Group> group = Groups::all().find(number);
    if (!group) fail("cumoe: the group of ranks is closed");
    return group;
}

} // namespace cumoe_torch

#endif
