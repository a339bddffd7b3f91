// How the scan is divided: every chunk is some block's work once, whatever cu_seqlens holds, the host's bounds hold
// without reading it, and the choice of segments is the one that the costs say.
#include <gtest/gtest.h>

#include <random>

#include "kda/chunk/segments.h"
#include "kda/chunk/variants.h"
#include "kda/chunk_fwd/schedule.h"

namespace kda {
namespace {

struct Variant16 {  // small chunks, so that short sequences have many
  using Element = float;
  static constexpr char const* name = "test";
  static constexpr ChunkConfig config{16, 64, 1};
};

/// As describe_chunk_fwd, as far as sizes go: the kernels are not compiled here.
template <class V>
ChunkFwdVariant sizes_of() {
  ChunkFwdVariant v{};
  v.name = V::name, v.dtype = Dtype::kBfloat16, v.chunk = V::config.chunk, v.key_tile = V::config.key_tile;
  v.record_bytes = sizeof(ChunkRecord<V>), v.value_tile_bytes = sizeof(typename ChunkRecord<V>::Values);
  v.wgmma = V::config.wgmma;
  v.prepare = {v.name, v.dtype, v.key_tile, 512, 2, 108 << 10};
  return v;
}

DeviceTraits const kH100 = hopper_gpu(132, 3.0);

/// sequences = 0: one batch row without cu_seqlens.
ChunkFwdCall call_of(int64_t tokens, int value_heads, int sequences = 0, bool batch_invariant = false) {
  static int32_t const known = 0;
  ChunkFwdParams p{};
  p.plan = {tokens, sequences ? sequences : 1, sequences ? &known : nullptr, false, 64, {}};
  p.value_heads = value_heads, p.key_dim = p.value_dim = 128, p.batch_invariant = batch_invariant;
  return ChunkFwdCall(p);
}

/// Each chunk of the round once, its segments in order and next to each other, none beyond the host's bound.
void expect_cover(ChunkFwdParams const& p) {
  ChunkPlan const plan = plan_of<Variant16>(p);
  int64_t const length = p.segment_tokens / plan.chunk, blocks = round_segments(p.plan, p.round_cells, length);
  std::vector<int> covered(size_t(p.round_cells), 0), finished(size_t(plan.sequences), 0);
  ScanWork work, before{};
  for (int64_t x = 0; x < blocks + 5; ++x) {
    if (!find_scan_work<Variant16>(work, p, x, 0)) continue;
    ASSERT_LT(x, blocks);
    ASSERT_LT(x + (work.following ? 1 : 0), blocks) << "its summary would have no place";
    for (int64_t i = work.begin; i < work.end; ++i) ++covered[size_t(work.sequence.first_cell + i - p.first_cell)];
    if (work.chunks == 0) ++finished[size_t(work.n)];
    EXPECT_LE(work.end - work.begin, length);
    if (!work.first) {
      EXPECT_EQ(before.n, work.n);
      EXPECT_EQ(before.segment + 1, work.segment);
      EXPECT_EQ(before.end, work.begin);
      EXPECT_EQ(before.following, work.following + 1);
    }
    before = work;
  }
  for (int n = 0; n < plan.sequences; ++n) {
    Sequence const s = plan.sequence(n);
    int64_t const chunks = plan.chunks_of(s.length), from = p.first_cell - s.first_cell;
    for (int64_t i = 0; i < chunks; ++i)
      if (i >= from && i < from + p.round_cells) {
        EXPECT_EQ(covered[size_t(i - from)], 1) << "chunk " << i << " of sequence " << n;
        covered[size_t(i - from)] = 0;
      }
    if (chunks == 0) {
      EXPECT_EQ(finished[size_t(n)], from <= 0 && from + p.round_cells > 0) << "sequence " << n;
    }
  }
  for (int rest : covered) EXPECT_EQ(rest, 0);
}

void expect_cover_of_every_round(ChunkFwdParams& p) {
  int64_t const cells = p.plan.cells();
  for (int64_t const length : {int64_t(1), int64_t(2), int64_t(4), p.plan.chunks_of(p.plan.tokens) + 1})
    for (int64_t const round_cells : {cells, (cells + 1) / 2, int64_t(7), int64_t(1)}) {
      p.segment_tokens = length * p.plan.chunk;
      for (p.first_cell = 0; p.first_cell < cells && round_cells; p.first_cell += round_cells) {
        p.round_cells = int32_t(std::min(round_cells, cells - p.first_cell));
        expect_cover(p);
      }
    }
}

TEST(ScanSplit, EveryChunkOfRaggedSequencesOnce) {
  std::mt19937 random(0);
  for (int turn = 0; turn < 60; ++turn) {
    std::vector<int32_t> bounds{int32_t(random() % 3 == 0 ? random() % 40 : 0)};
    for (int n = 1 + int(random() % 9); n > 0; --n)
      bounds.push_back(bounds.back() + int32_t(random() % 3 ? random() % 200 : 0));
    ChunkFwdParams p{};
    p.value_heads = 1;
    p.plan = {bounds.back() + int32_t(random() % 2 * 50), int32_t(bounds.size()) - 1, bounds.data(), false, 16, {}};
    expect_cover_of_every_round(p);
  }
}

TEST(ScanSplit, EveryChunkOfEqualSequencesOnce) {
  for (int64_t const tokens : {1, 16, 100, 290})
    for (int const batch : {1, 3}) {
      ChunkFwdParams p{};
      p.value_heads = 1;
      p.plan = {tokens, batch, nullptr, false, 16, {}};
      expect_cover_of_every_round(p);
    }
}

TEST(ScanSplit, SequencesWithoutTokensAreFinishedOnce) {
  ChunkFwdParams p{};
  p.value_heads = 1;
  p.plan = {0, 3, nullptr, false, 16, {}};
  p.segment_tokens = 16;
  ScanWork work;
  for (int n = 0; n < 3; ++n) {
    ASSERT_TRUE(find_scan_work<Variant16>(work, p, n, 0));
    EXPECT_EQ(work.n, n);
    EXPECT_EQ(work.chunks, 0);
  }
  EXPECT_FALSE(find_scan_work<Variant16>(work, p, 3, 0));
  EXPECT_EQ(round_segments(p.plan, 0, 1), 3);
}

TEST(ScanSplit, FewHeadsAreSplitAndManyAreNot) {
  ChunkFwdVariant const v = sizes_of<Bf16K128Sm90>();
  struct Shape {
    int64_t tokens;
    int heads, sequences;
    bool split;
  };
  for (Shape const s :
       {Shape{131072, 4, 0, true}, Shape{65536, 8, 0, true}, Shape{32768, 2, 0, true}, Shape{8192, 16, 0, false},
        Shape{8192, 64, 0, false}, Shape{64, 4, 0, false}, Shape{8192, 12, 64, false}}) {
    ChunkFwdCall const call = call_of(s.tokens, s.heads, s.sequences);
    ChunkFwdSchedule const x = schedule_chunk_fwd(v, call, kH100);
    EXPECT_EQ(x.segment_chunks > 0, s.split) << s.tokens << " tokens, " << s.heads << " heads";
    std::printf("%lld tokens, %d heads, %d sequences: %.0f us unsplit, %.0f us split; %lld segments of %lld chunks\n",
                (long long)s.tokens, s.heads, s.sequences, x.unsplit_us, x.split_us, (long long)x.mean_segments,
                (long long)x.segment_chunks);
    if (!s.split) continue;
    EXPECT_LT(x.split_us, ScanCost::kWorthwhile * x.unsplit_us);
    EXPECT_EQ(x.reason, SplitReason::kCost);
    EXPECT_EQ(x.total_us, x.split_us);
    EXPECT_FALSE(x.beside);
    ChunkFwdSchedule const invariant = schedule_chunk_fwd(v, call_of(s.tokens, s.heads, s.sequences, true), kH100);
    EXPECT_EQ(invariant.segment_chunks, 0) << "batch_invariant";
    EXPECT_EQ(invariant.reason, SplitReason::kInvariant);
    EXPECT_LE(x.whole.segments, x.workspace.most_segments());
    EXPECT_EQ(x.workspace.bytes_per_segment, size_t(s.heads) * size_t(segment_floats(128, 128)) * 4);
  }
}

/// Rounds come after each other and are all of the work, in the workspace that the schedule asks for.
TEST(ScanSplit, RoundsAreAllOfTheWork) {
  ChunkFwdVariant const v = sizes_of<Bf16K128Sm90>();
  for (int64_t const tokens : {1, 64, 1000, 8192, 70000})
    for (int const heads : {1, 16, 64})
      for (int const sequences : {0, 1, 7}) {
        ChunkFwdCall const call = call_of(tokens, heads, sequences);
        ChunkFwdSchedule const s = schedule_chunk_fwd(v, call, kH100);
        int64_t cells = 0;
        for (int64_t i = 0; i < s.rounds; ++i) {
          cells += s.round(i).cells;
          EXPECT_GT(s.round(i).cells, 0);
          EXPECT_LE(s.round(i).cells, s.workspace.most_cells);
          EXPECT_LE(s.round(i).walkers, s.round(i).cells);
        }
        EXPECT_EQ(cells, call.plan.cells()) << tokens << " tokens, " << heads << " heads";
        EXPECT_LE(s.workspace.carry, s.workspace.progress);
        EXPECT_LT(s.workspace.progress, s.workspace.segments);
        EXPECT_EQ(s.workspace.bytes(), kRecordAlignment + s.workspace.segments + s.workspace.segment_bytes);
      }
}

TEST(ScanSplit, ScanRunsBesidePrepareWhereItLeavesMultiprocessorsFree) {
  ChunkFwdVariant const v = sizes_of<Bf16K128Sm90>();
  for (auto const& [tokens, heads, beside] :
       {std::tuple{8192, 16, true}, {4096, 8, true}, {8192, 24, true}, {8192, 64, false}, {64, 4, false}}) {
    ChunkFwdCall const call = call_of(tokens, heads);
    ChunkFwdSchedule const s = schedule_chunk_fwd(v, call, kH100);
    std::printf("%d tokens, %d heads: %.0f us, rounds of %lld cells, %lld multiprocessors for the scan, %d walkers\n",
                tokens, heads, s.unsplit_us, (long long)s.whole.cells, (long long)s.reserved, s.whole.walkers);
    EXPECT_EQ(s.reserved > 0, beside) << tokens << " tokens, " << heads << " heads";
    EXPECT_LE(size_t(s.whole.cells * heads * s.workspace.cell_bytes), s.workspace.carry);
    if (!beside) continue;
    EXPECT_EQ(s.reserved, 2 * heads) << "a block for 64 columns of V";
    EXPECT_LE(divide_up(int64_t(s.whole.walkers) * heads, s.teams) + s.reserved, 132) << "all at once";
  }
  DeviceTraits without = kH100;
  without.overlaps_kernels = false;
  ChunkFwdSchedule const s = schedule_chunk_fwd(v, call_of(8192, 16), without);
  EXPECT_EQ(s.reserved, 0);
  EXPECT_FALSE(s.beside);
}

}  // namespace
}  // namespace kda
