// Memory of the KV cache: zeroed pages that grow without being copied, and that the kernel may back with huge ones.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>

#include <sys/mman.h>

namespace sprat {

class KVCacheBuffer {
public:
    KVCacheBuffer() = default;
    ~KVCacheBuffer() {
        if (at_) munmap(at_, size_);
    }
    KVCacheBuffer(const KVCacheBuffer&) = delete;
    KVCacheBuffer& operator=(const KVCacheBuffer&) = delete;

    std::uint8_t* at() const { return at_; }
    std::size_t size() const { return size_; }

    // What is stored stays; what is new is zero. std::bad_alloc where there is no memory.
    void grow(std::size_t size) {
        size = (size + kHuge - 1) / kHuge * kHuge;
        if (size <= size_) return;
#if defined(__linux__)
        void* got = at_ ? mremap(at_, size_, size, MREMAP_MAYMOVE) : map(size);
        if (got == MAP_FAILED) throw std::bad_alloc();
        madvise(got, size, MADV_HUGEPAGE);
#else
        void* got = map(size);
        if (got == MAP_FAILED) throw std::bad_alloc();
        if (at_) {
            std::memcpy(got, at_, size_);
            munmap(at_, size_);
        }
#endif
        at_ = static_cast<std::uint8_t*>(got), size_ = size;
    }

private:
    static constexpr std::size_t kHuge = std::size_t{1} << 21;
    static void* map(std::size_t size) {
        return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    std::uint8_t* at_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace sprat
