// Meeting points in memory that several processes of one host share.
//
// A word counts what its one writer has done; everyone else waits until it has reached a number.
// Numbers wrap around, so they are compared by the sign of their difference. A waiter spins for a
// moment, since its peers compute the same layer and come within microseconds, and then sleeps on
// the word, since there may be more processes than cores.
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kStride = 16;  // words between two counters: one cache line each
constexpr long kNap = 2'000'000;  // nanoseconds of one sleep; a wake-up usually ends it sooner

constexpr int64_t kAtOnce = 512;  // elements that are summed in the nearest cache

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == sizeof(uint32_t) && Word::is_always_lock_free);

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
}

bool reached(const Word& word, uint32_t value) {
  return static_cast<int32_t>(word.load(std::memory_order_acquire) - value) >= 0;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void post(Word& word, uint32_t value) {
  word.store(value, std::memory_order_release);
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool await(Word& word, uint32_t value, int spins, int64_t timeout) {
  for (int spin = 0; spin < spins; ++spin) {
    if (reached(word, value)) return true;
    pause();
  }
  const int64_t deadline = now() + timeout;
  const timespec nap{0, kNap};
  while (!reached(word, value)) {
    const uint32_t seen = word.load(std::memory_order_acquire);
    if (static_cast<int32_t>(seen - value) >= 0) break;
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &nap, nullptr, 0);
    if (now() > deadline) return reached(word, value);
  }
  return true;
}

float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  // Round to the nearest, ties to even; what is not a number stays so. Without a branch, so that
  // the compiler can take several at once.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const uint32_t kept = (bits >> 16) | 64;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? kept : rounded);
}

}  // namespace

extern "C" {

void shoal_post(uint32_t* word, uint32_t value) { post(*reinterpret_cast<Word*>(word), value); }

// 1 once the word has reached the value, 0 if it has not within `timeout` nanoseconds.
int shoal_await(uint32_t* word, uint32_t value, int spins, int64_t timeout) {
  return await(*reinterpret_cast<Word*>(word), value, spins, timeout);
}

// Posts `turn` as member `me` and waits for the `members`: -1, or who has not come.
int shoal_meet(uint32_t* words, int members, int me, uint32_t turn, int spins, int64_t timeout) {
  auto* const counters = reinterpret_cast<Word*>(words);
  post(counters[me * kStride], turn);
  for (int member = 0; member < members; ++member)
    if (!await(counters[member * kStride], turn, spins, timeout)) return member;
  return -1;
}

// target[i] = the sum over members of slots[member][i], in the members' order and in float32, so
// that all of them get the same bits.
void shoal_sum_float32(float* target, const char* slots, int64_t stride, int members, int64_t count) {
  const auto* first = reinterpret_cast<const float*>(slots);
  if (members == 2) {
    const auto* second = reinterpret_cast<const float*>(slots + stride);
    for (int64_t i = 0; i < count; ++i) target[i] = first[i] + second[i];
    return;
  }
  std::memcpy(target, first, count * sizeof(float));
  for (int member = 1; member < members; ++member) {
    const auto* part = reinterpret_cast<const float*>(slots + member * stride);
    for (int64_t i = 0; i < count; ++i) target[i] += part[i];
  }
}

void shoal_sum_bfloat16(uint16_t* target, const char* slots, int64_t stride, int members, int64_t count) {
  float sums[kAtOnce];
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t size = count - first < kAtOnce ? count - first : kAtOnce;
    for (int member = 0; member < members; ++member) {
      const auto* part = reinterpret_cast<const uint16_t*>(slots + member * stride) + first;
      for (int64_t i = 0; i < size; ++i) sums[i] = (member ? sums[i] : 0) + widened(part[i]);
    }
    for (int64_t i = 0; i < size; ++i) target[first + i] = narrowed(sums[i]);
  }
}
}
