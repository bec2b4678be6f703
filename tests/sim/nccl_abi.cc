// What cuda/nccl.cuh declares, against NCCL's own header. It is compiled, and that is the test.
#include "cuda/nccl.cuh"

#include <nccl.h>
#include <type_traits>

static_assert(sizeof(ncclUniqueId) == sizeof(cumoe_ep_id_t) && alignof(ncclUniqueId) == alignof(cumoe_ep_id_t));
static_assert(cumoe::kNcclSuccess == int{ncclSuccess} && cumoe::kNcclInProgress == int{ncclInProgress});
static_assert(cumoe::kNcclUint8 == int{ncclUint8} && cumoe::kNcclInt32 == int{ncclInt32} &&
              cumoe::kNcclInt64 == int{ncclInt64} && cumoe::kNcclFloat32 == int{ncclFloat32} &&
              cumoe::kNcclFloat64 == int{ncclFloat64} && cumoe::kNcclSum == int{ncclSum});
static_assert(NCCL_VERSION(2, 18, 0) == cumoe::kOldestNccl);

// The fields of 2.14 stand where they stood.
static_assert(offsetof(ncclConfig_t, size) == offsetof(cumoe::NcclConfig, size) &&
              offsetof(ncclConfig_t, magic) == offsetof(cumoe::NcclConfig, magic) &&
              offsetof(ncclConfig_t, version) == offsetof(cumoe::NcclConfig, version) &&
              offsetof(ncclConfig_t, blocking) == offsetof(cumoe::NcclConfig, blocking));
constexpr ncclConfig_t kTheirs = NCCL_CONFIG_INITIALIZER;
static_assert(cumoe::NcclConfig{}.magic == kTheirs.magic && cumoe::NcclConfig{}.version == NCCL_VERSION(2, 14, 0));

// Arguments of the same size, and pointers where there are pointers.
template <typename A, typename B>
constexpr bool kSame = sizeof(A) == sizeof(B) && std::is_pointer<A>::value
                                                     == std::is_pointer<B>::value &&std::is_class<A>::value
                                                     == std::is_class<B>::value;

template <typename ResultA, typename... A, typename ResultB, typename... B>
constexpr bool same(ResultA (*)(A...), ResultB (*)(B...))
{
    if constexpr (sizeof...(A) == sizeof...(B))
        return kSame<ResultA, ResultB> && (kSame<A, B> && ...);
    else
        return false;
}

#define SAME(name, ...)                                                                                            \
    static_assert(same(static_cast<decltype(cumoe::Nccl::name)>(nullptr), static_cast<decltype(&name)>(nullptr)),  \
                  #name);
CUMOE_NCCL_FUNCTIONS(SAME)
SAME(ncclGetErrorString)
SAME(ncclGetLastError)
