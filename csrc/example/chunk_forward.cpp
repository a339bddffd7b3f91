// The chunkwise forward from a program without torch. One sequence of fp32, from standard input to standard output:
//
//   chunk_forward TOKENS HEADS K V < inputs > outputs
//
// inputs: q, k [TOKENS, HEADS, K], v [TOKENS, HEADS, V], g [TOKENS, HEADS, K] (log-decays), beta [TOKENS, HEADS].
// outputs: o [TOKENS, HEADS, V], then the final state [HEADS, K, V]. q is scaled by 1 / sqrt(K) and nothing else.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kda/chunk_fwd/dispatch.h"
#include "memory.h"

namespace {

using Element = float;  // or kda::Bf16, kda::Fp16, of q, k, v and o; g and beta may be fp32 beside them

struct Sizes {
  int64_t tokens, heads, key_dim, value_dim;
};

/// A tensor [tokens, heads, columns] that the kernels can reach.
struct Tensor {
  Sizes sizes;
  int64_t columns;
  DeviceMemory memory;

  Tensor(Sizes const& s, int64_t c) : sizes(s), columns(c), memory(elements() * sizeof(Element)) {}
  size_t elements() const { return size_t(sizes.tokens * sizes.heads * columns); }
  kda::Rows rows() const {
    int64_t const head = columns, token = sizes.heads * head, batch = sizes.tokens * token;
    bool const in_pieces = columns * sizeof(Element) % 16 == 0;
    return {memory.data(), {batch, token, head}, sizeof(Element) == 4, in_pieces};
  }
  Tensor& read() {
    std::vector<Element> host(elements());
    if (std::fread(host.data(), sizeof(Element), host.size(), stdin) != host.size())
      throw std::runtime_error("standard input is too short");
    memory.read_from(host.data());
    return *this;
  }
};

void write(DeviceMemory const& memory, size_t bytes) {
  std::vector<char> host(bytes);
  memory.write_to(host.data());
  if (std::fwrite(host.data(), 1, bytes, stdout) != bytes)
    throw std::runtime_error("standard output cannot be written");
}

void forward(Sizes const& s) {
  Tensor q(s, s.key_dim), k(s, s.key_dim), v(s, s.value_dim), g(s, s.key_dim), beta(s, 1), o(s, s.value_dim);
  for (Tensor* input : {&q, &k, &v, &g, &beta}) input->read();
  size_t const state_bytes = size_t(s.heads * s.key_dim * s.value_dim) * sizeof(float);
  DeviceMemory const final_state(state_bytes);

  // The first compiled variant that serves the call on this device.
  kda::DeviceTraits const device = kda::device_traits();
  kda::ChunkFwdVariant const* const variant =
      kda::select_chunk_fwd(kda::dtype_of<Element>(), int(s.key_dim), 64, device);
  if (!variant) throw std::runtime_error("no kernel serves this call on this device");

  kda::ChunkFwdParams p{};
  p.q = q.rows(), p.k = k.rows(), p.v = v.rows(), p.g = g.rows(), p.beta = beta.rows(), p.o = o.rows();
  p.plan.tokens = s.tokens, p.plan.sequences = 1, p.plan.chunk = variant->chunk;
  p.heads = p.value_heads = int32_t(s.heads), p.key_dim = int32_t(s.key_dim), p.value_dim = int32_t(s.value_dim);
  p.scale = 1 / std::sqrt(float(s.key_dim));
  p.gate.kind = kda::GateKind::kLogDecay;
  p.final_state = {final_state.data(), {{}, 1, false}, s.heads * s.key_dim * s.value_dim, kda::Dtype::kFloat32, false};

  // Shapes and the device say how the call is launched, and how much memory it takes meanwhile.
  kda::ChunkFwdSchedule const schedule = kda::schedule_chunk_fwd(*variant, kda::ChunkFwdCall(p), device);
  DeviceMemory const workspace(schedule.workspace.bytes());
  p.workspace = workspace.data();
  variant->launch(p, schedule, nullptr);  // the default stream

  write(o.memory, o.elements() * sizeof(Element));
  write(final_state, state_bytes);
  std::fprintf(stderr, "%s, %zu bytes of workspace\n", variant->name, schedule.workspace.bytes());
}

int64_t count(char const* text, long most) {
  char* end = nullptr;
  long const x = std::strtol(text, &end, 10);
  if (*end || end == text || x < 1 || x > most)
    throw std::runtime_error(std::string("got ") + text + ", expected a whole number from 1 to " +
                             std::to_string(most));
  return x;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) throw std::runtime_error("expected TOKENS HEADS K V");
  forward({count(argv[1], 1 << 20), count(argv[2], 65535), count(argv[3], 256), count(argv[4], 1 << 16)});
  return 0;
} catch (std::exception const& e) {
  std::fprintf(stderr, "chunk_forward: %s\n", e.what());
  return 1;
}
