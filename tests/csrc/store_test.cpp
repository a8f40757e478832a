// The layer store's reader over a disk with faults: the index check, the ring, errors, threads, fork. Built with
// CHAINFED_SANITIZE=thread or address,undefined this is also the proof that the ring has no race.
#include "chainfed/store.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <random>
#include <thread>

#include "chainfed/error.h"
#include "chainfed/kernels.h"
#include "check.h"
#include "faulty_file.h"

using namespace chainfed;
using chainfed::testing::Disk;
using chainfed::testing::opener;

namespace {

constexpr int64_t kCols = 96;

// Files "0", "1", ... of one f32 matrix "w" [num_rows, 96] whose every element is the file's number.
struct Fixture {
  std::shared_ptr<Disk> disk = std::make_shared<Disk>();
  std::vector<FileEntry> files;

  explicit Fixture(int num_files, int64_t num_rows = 1000) {
    for (int i = 0; i < num_files; ++i) add(std::to_string(i), num_rows, static_cast<float>(i));
  }
  void add(const std::string& path, int64_t num_rows, float value) {
    const std::vector<float> values(static_cast<size_t>(num_rows * kCols), value);
    const int64_t bytes = num_rows * kCols * 4;
    std::vector<char> data(static_cast<size_t>(4096 + bytes));
    std::memcpy(data.data() + 4096, values.data(), static_cast<size_t>(bytes));
    disk->files[path] = std::move(data);
    files.push_back({path, 4096 + bytes, {{"w", BlockFormat::f32, num_rows, kCols, 4096, bytes, 0, 0}}});
  }
  std::unique_ptr<StoreReader> open(int num_slots) {
    return std::make_unique<StoreReader>(files, num_slots, true, opener(disk));
  }
};

bool holds(const Lease& lease, float value) {
  const MatrixView view = lease.matrix("w");
  const float* data = static_cast<const float*>(view.codes);
  for (int64_t i = 0; i < view.num_rows * view.num_cols; ++i) {
    if (data[i] != value) return false;
  }
  return true;
}

template <typename Exception>
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

std::string index_error(const std::function<void(FileEntry&)>& spoil) {
  Fixture fixture(1);
  TensorEntry second = fixture.files[0].tensors[0];
  second.name = "b";
  second.num_rows = 1;
  second.codes_bytes = kCols * 4;
  second.codes_offset = 0;
  fixture.files[0].tensors.push_back(second);
  spoil(fixture.files[0]);
  return message_of<CorruptFile>([&] { fixture.open(1); });
}

}  // namespace

TEST(lease_shows_the_file_and_nothing_after_release) {
  Fixture fixture(2);
  auto reader = fixture.open(2);
  auto lease = reader->acquire(1);
  CHECK(holds(*lease, 1.0f));
  CHECK(lease->names() == std::vector<std::string>{"w"});
  CHECK(contains(message_of<InvalidArgument>([&] { lease->matrix("x"); }), "it holds: w"));
  lease->release();
  lease->release();
  CHECK(!lease->valid());
  CHECK_THROWS(InvalidArgument, lease->matrix("w"));
  CHECK_THROWS(InvalidArgument, lease->pin());
  CHECK_THROWS(InvalidArgument, reader->acquire(2));
  CHECK_THROWS(InvalidArgument, reader->prefetch(-1));
}

TEST(index_that_lies_is_refused_with_the_reason) {
  CHECK(index_error([](FileEntry&) {}) == "nothing was thrown");
  CHECK(contains(index_error([](FileEntry& f) { f.file_bytes += 4096; }), "but the index says"));
  CHECK(contains(index_error([](FileEntry& f) { f.file_bytes = -1; }), "-1 bytes"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[0].codes_offset = 4100; }), "multiple of 64"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[0].codes_offset = -64; }), "multiple of 64"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[0].codes_offset = INT64_MAX / 64 * 64; }), "do not fit"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[0].codes_offset = 4096 + 64; }), "do not fit"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[0].codes_bytes -= 4; }), "needs"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[0].scales_bytes = 32; }), "needs 0"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[0].num_rows = 0; }), "num_rows"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[0].num_rows = INT64_MAX; }), "overflow"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[1].codes_offset = 4096 + 64; }), "overlap"));
  CHECK(contains(index_error([](FileEntry& f) { f.tensors[1].name = "w"; }), "repeated"));
  CHECK_THROWS(InvalidArgument, Fixture(1).open(0));
  CHECK_THROWS(InvalidArgument, StoreReader({}, 1, true));
}

TEST(least_recently_used_slot_goes_first) {
  Fixture fixture(4);
  auto reader = fixture.open(2);
  reader->acquire(0);
  reader->acquire(1);
  reader->acquire(0);
  reader->acquire(2);  // evicts 1
  CHECK(reader->try_acquire(0) != nullptr);
  CHECK(reader->try_acquire(1) == nullptr);
  CHECK(reader->try_acquire(2) != nullptr);
  const ReaderStats stats = reader->stats();
  CHECK(stats.misses == 3 && stats.hits == 3);
  CHECK(stats.resident_bytes == 2 * reader->slot_bytes());
  CHECK(stats.bytes_read == 3 * fixture.files[0].file_bytes);
}

TEST(small_file_in_a_large_slot_holds_only_its_pages) {
  Fixture fixture(1, 40000);
  fixture.add("small", 10, 7.0f);
  auto reader = fixture.open(1);
  reader->acquire(0);
  CHECK(reader->stats().resident_bytes == reader->slot_bytes());
  CHECK(holds(*reader->acquire(1), 7.0f));
  CHECK(reader->stats().resident_bytes == round_up(fixture.files[1].file_bytes, 4096));
}

TEST(acquire_with_every_slot_pinned_says_how_many_there_are) {
  Fixture fixture(3);
  auto reader = fixture.open(2);
  auto first = reader->acquire(0);
  auto second = reader->acquire(1);
  const std::string message = message_of<InvalidArgument>([&] { reader->acquire(2); });
  CHECK(contains(message, "all 2 slots are pinned") && contains(message, "release a lease"));
  reader->prefetch(2);  // does nothing
  auto again = reader->acquire(0);
  first->release();
  CHECK_THROWS(InvalidArgument, reader->acquire(2));
  again->release();
  CHECK(holds(*reader->acquire(2), 2.0f));
  CHECK(holds(*second, 1.0f));
}

TEST(prefetch_reads_behind_the_caller_and_is_not_undone_by_the_next) {
  Fixture fixture(4);
  auto reader = fixture.open(2);
  auto lease = reader->acquire(0);
  reader->prefetch(1);
  reader->prefetch(2);  // the only free slot holds 1, not yet used
  while (reader->stats().bytes_read < 2 * fixture.files[0].file_bytes) std::this_thread::yield();
  CHECK(holds(*reader->acquire(1), 1.0f));
  CHECK(fixture.disk->reads_of("2") == 0);
  lease->release();
  reader->prefetch(3);
  CHECK(holds(*reader->acquire(3), 3.0f));
  CHECK(fixture.disk->reads_of("3") == 1);
}

TEST(acquire_keeps_the_newest_prefetch_when_it_can) {
  Fixture fixture(4);
  auto reader = fixture.open(2);
  reader->prefetch(0);
  reader->acquire(0);
  reader->prefetch(1);
  while (reader->stats().bytes_read < 2 * fixture.files[0].file_bytes) std::this_thread::yield();
  reader->acquire(0);
  reader->acquire(2);  // 1 is less recently used, but it is the newest prefetch
  CHECK(reader->try_acquire(0) == nullptr);
  CHECK(holds(*reader->acquire(1), 1.0f));
  CHECK(fixture.disk->reads_of("1") == 1);
}

TEST(acquire_takes_over_what_is_only_queued) {
  Fixture fixture(4);
  auto reader = fixture.open(3);
  fixture.disk->set_gate(false);
  reader->prefetch(0);
  fixture.disk->wait_for_readers(1);
  reader->prefetch(1);
  reader->prefetch(2);  // both wait behind 0
  std::thread caller([&] { CHECK(holds(*reader->acquire(2), 2.0f)); });
  std::thread other([&] { CHECK(holds(*reader->acquire(3), 3.0f)); });  // cancels 1
  fixture.disk->wait_for_readers(3);
  fixture.disk->set_gate(true);
  caller.join();
  other.join();
  CHECK(fixture.disk->reads_of("2") == 1 && fixture.disk->reads_of("3") == 1);
  CHECK(reader->stats().stall_ns > 0);
}

TEST(acquire_of_another_file_waits_for_the_read_in_the_only_slot) {
  Fixture fixture(2);
  auto reader = fixture.open(1);
  fixture.disk->set_gate(false);
  reader->prefetch(0);
  fixture.disk->wait_for_readers(1);
  std::thread caller([&] { CHECK(holds(*reader->acquire(1), 1.0f)); });
  fixture.disk->set_gate(true);
  caller.join();
}

TEST(short_and_interrupted_reads_are_continued) {
  for (const bool direct : {true, false}) {
    Fixture fixture(1);
    fixture.disk->direct = direct;
    fixture.disk->short_reads["0"] = {100, 4096, 5000, 12288, 1, 8192 + 17};
    fixture.disk->errors["0"] = {EINTR, 0, EINTR, EAGAIN};
    auto reader = fixture.open(1);
    CHECK(reader->direct() == direct);
    CHECK_IN(holds(*reader->acquire(0), 0.0f), "direct %d", direct);
  }
}

TEST(read_that_never_advances_is_an_error_not_a_loop) {
  Fixture fixture(1);
  fixture.disk->short_reads["0"].assign(1000, 0);
  auto reader = fixture.open(1);
  CHECK(contains(message_of<IoError>([&] { reader->acquire(0); }), "the disk is failing"));
}

TEST(io_error_names_path_and_offset_and_the_next_acquire_reads_again) {
  Fixture fixture(2);
  auto reader = fixture.open(1);
  fixture.disk->short_reads["0"] = {8192};
  fixture.disk->errors["0"] = {0, EIO};
  const std::string message = message_of<IoError>([&] { reader->acquire(0); });
  CHECK(contains(message, "0 at offset 8192 failed") && contains(message, "nput/output error"));
  CHECK(holds(*reader->acquire(0), 0.0f));
}

TEST(error_of_a_prefetch_surfaces_at_acquire_once) {
  Fixture fixture(2);
  auto reader = fixture.open(2);
  fixture.disk->fail_next("1", EIO);
  reader->prefetch(1);
  while (fixture.disk->reads_of("1") == 0) std::this_thread::yield();
  CHECK(holds(*reader->acquire(0), 0.0f));
  CHECK(contains(message_of<IoError>([&] { reader->acquire(1); }), "1 at offset 0"));
  CHECK(holds(*reader->acquire(1), 1.0f));
}

TEST(file_cut_while_open_is_corrupt) {
  Fixture fixture(1);
  auto reader = fixture.open(1);
  fixture.disk->files["0"].resize(5000);
  CHECK(contains(message_of<CorruptFile>([&] { reader->acquire(0); }), "ends at byte 5000"));
  fixture.disk->files["0"].resize(0);
  CHECK_THROWS(CorruptFile, reader->acquire(0));
}

TEST(every_thread_that_waits_for_a_failing_read_gets_its_error) {
  Fixture fixture(1);
  auto reader = fixture.open(1);
  fixture.disk->set_gate(false);
  fixture.disk->fail_next("0", EIO);
  reader->prefetch(0);
  fixture.disk->wait_for_readers(1);
  std::atomic<int> num_failed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      try {
        reader->acquire(0);
      } catch (const IoError&) {
        ++num_failed;
      }
    });
  }
  while (reader->stats().misses < 3) std::this_thread::yield();
  fixture.disk->set_gate(true);
  for (std::thread& thread : threads) thread.join();
  CHECK(num_failed == 3);
  CHECK(holds(*reader->acquire(0), 0.0f));
}

TEST(destroying_the_reader_during_a_read_is_safe_and_leases_outlive_it) {
  Fixture fixture(2);
  auto reader = fixture.open(2);
  auto lease = reader->acquire(1);
  fixture.disk->set_gate(false);
  reader->prefetch(0);
  fixture.disk->wait_for_readers(1);
  std::thread opener_of_gate([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    fixture.disk->set_gate(true);
  });
  reader.reset();
  opener_of_gate.join();
  CHECK(holds(*lease, 1.0f));
}

TEST(pin_keeps_the_memory_when_another_thread_releases) {
  Fixture fixture(2);
  auto reader = fixture.open(1);
  auto lease = reader->acquire(0);
  const MatrixView view = lease->matrix("w");
  auto pin = lease->pin();
  lease->release();
  CHECK_THROWS(InvalidArgument, reader->acquire(1));
  CHECK(static_cast<const float*>(view.codes)[5] == 0.0f);
  pin.reset();
  CHECK(holds(*reader->acquire(1), 1.0f));
}

TEST(many_threads_see_the_right_bytes) {
  Fixture fixture(7, 200);
  auto reader = fixture.open(4);
  fixture.disk->errors["3"] = {EIO, 0, EIO};
  std::atomic<int> num_wrong{0}, num_done{0};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 3; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      while (num_done < 600) {
        const int file = static_cast<int>(random() % 7);
        try {
          reader->prefetch(static_cast<int>(random() % 7));
          auto lease = reader->acquire(file);
          if (!holds(*lease, static_cast<float>(file))) ++num_wrong;
          lease->release();
        } catch (const IoError&) {
          if (file != 3) ++num_wrong;
        }
        ++num_done;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(num_wrong == 0);
}

TEST(gather_from_disk_equals_the_kernel_on_the_resident_matrix) {
  std::mt19937 random(5);
  for (const BlockFormat format :
       {BlockFormat::int4, BlockFormat::nf4, BlockFormat::int8, BlockFormat::bf16, BlockFormat::f32}) {
    const int64_t num_rows = 5003, num_cols = 200;
    const int64_t codes = codes_bytes(format, num_rows, num_cols), scales = scales_bytes(format, num_rows, num_cols);
    const int64_t scales_at = 4096 + round_up(codes, 64), file_bytes = scales_at + scales;
    std::vector<float> weight(static_cast<size_t>(num_rows * num_cols));
    for (float& w : weight) w = std::normal_distribution<float>()(random);
    Fixture fixture(0);
    std::vector<char>& data = fixture.disk->files["e"];
    data.resize(static_cast<size_t>(file_bytes));
    quantize_blocks(weight.data(), num_rows, num_cols, format, data.data() + 4096,
                    scales > 0 ? data.data() + scales_at : nullptr);
    fixture.files.push_back(
        {"e", file_bytes, {{"w", format, num_rows, num_cols, 4096, codes, scales > 0 ? scales_at : 0, scales}}});
    auto reader = fixture.open(1);
    const std::vector<int64_t> ids = {5002, 0, 7, 8, 8, 4000, 2500, 2501, 5002, 17};
    std::vector<float> expected(ids.size() * num_cols), got(ids.size() * num_cols);
    reader->gather_rows_from_disk(0, "w", ids.data(), static_cast<int64_t>(ids.size()), got.data());
    CHECK_IN(reader->stats().bytes_read < file_bytes / 2, "%s", block_format_name(format));
    gather_rows(reader->acquire(0)->matrix("w"), ids.data(), static_cast<int64_t>(ids.size()), expected.data());
    CHECK_IN(got == expected, "%s", block_format_name(format));
    const int64_t outside = num_rows;
    CHECK_THROWS(InvalidArgument, reader->gather_rows_from_disk(0, "w", &outside, 1, got.data()));
  }
}

TEST(gather_of_every_row_goes_in_bounded_pieces) {
  Fixture fixture(1, 20000);  // 7.7 MB
  auto reader = fixture.open(1);
  std::vector<int64_t> ids(20000);
  std::iota(ids.begin(), ids.end(), 0);
  std::vector<float> out(ids.size() * kCols, -1.0f);
  reader->gather_rows_from_disk(0, "w", ids.data(), 20000, out.data());
  CHECK(std::all_of(out.begin(), out.end(), [](float v) { return v == 0.0f; }));
  CHECK(fixture.disk->reads_of("0") >= 8 && fixture.disk->reads_of("0") <= 16);
  fixture.disk->fail_next("0", EIO);
  CHECK_THROWS(IoError, reader->gather_rows_from_disk(0, "w", ids.data(), 1, out.data()));
}

#ifndef __SANITIZE_THREAD__  // which does not follow fork() in a program with threads
TEST(child_of_fork_is_refused_and_ends_without_hanging) {
  Fixture fixture(2);
  auto reader = fixture.open(2);
  auto lease = reader->acquire(0);
  reader->prefetch(1);
  const pid_t child = ::fork();
  if (child == 0) {
    int refused = 0;
    for (const auto& call : std::vector<std::function<void()>>{[&] { reader->acquire(0); },
                                                               [&] { reader->prefetch(1); }, [&] { reader->stats(); },
                                                               [&] { lease->matrix("w"); }, [&] { lease->pin(); }}) {
      if (contains(message_of<InvalidArgument>(call), "before fork()")) ++refused;
    }
    lease.reset();
    reader.reset();
    ::_exit(refused);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 5);
  CHECK(holds(*lease, 0.0f));
  CHECK(holds(*reader->acquire(1), 1.0f));
}
#endif
