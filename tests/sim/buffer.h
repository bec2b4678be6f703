/* Device memory of a test: copied there at the beginning, back on request. */
#ifndef CUMOE_SIM_BUFFER_H
#define CUMOE_SIM_BUFFER_H

#include <cuda_runtime.h>
#include <vector>

template <typename T>
class Buffer
{
  public:
    explicit Buffer(size_t count) : Buffer(std::vector<T>(count))
    {
        (void)cudaMemset(data_, 0xff, count_ * sizeof(T)); // poison
    }
    explicit Buffer(const std::vector<T> &values) : count_(values.size())
    {
        (void)cudaMalloc(&data_, count_ * sizeof(T));
        (void)cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice);
    }
    ~Buffer()
    {
        (void)cudaFree(data_);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    T *data()
    {
        return data_;
    }
    std::vector<T> read() const
    {
        std::vector<T> values(count_);
        (void)cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
        return values;
    }

  private:
    T *data_ = nullptr;
    size_t count_;
};

#endif
