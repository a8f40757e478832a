// StoreReader and Lease: opening and checking the store's files, then everything is the ring's.
#include <algorithm>
#include <atomic>
#include <set>

#include "chainfed/error.h"
#include "chainfed/store.h"
#include "store/file.h"
#include "store/gather.h"
#include "store/index.h"
#include "store/ring.h"

namespace chainfed {
namespace {

void check_real_size(const FileEntry& entry, const ReadFile& handle) {
  const int64_t real_bytes = handle.size();
  if (real_bytes < 0) throw IoError("cannot learn the size of " + entry.path);
  if (real_bytes == entry.file_bytes) return;
  throw CorruptFile(entry.path + " has " + std::to_string(real_bytes) + " bytes, but the index says " +
                    std::to_string(entry.file_bytes) + "; convert the model again");
}

// A child made by fork() has neither the thread nor a sound mutex: destroying the ring there could hang.
void delete_in_owner_process(Ring* ring) {
  if (ring->in_owner_process()) delete ring;
}

MatrixView view_at(const TensorEntry& tensor, const char* data) {
  return {tensor.format, tensor.num_rows, tensor.num_cols, data + tensor.codes_offset,
          tensor.scales_bytes > 0 ? data + tensor.scales_offset : nullptr};
}

}  // namespace

struct Lease::State {
  std::shared_ptr<Ring> ring;
  int slot;
  int file;
  std::atomic<bool> released{false};

  const FileEntry& entry() const { return ring->entry(file); }
  void check_valid() const {
    if (!ring->in_owner_process()) ring->check_file(file);
    if (released.load())
      throw InvalidArgument("the lease of " + entry().path + " was released; acquire the file again");
  }
};

Lease::Lease(std::shared_ptr<Ring> ring, int slot, int file) : state_(new State{std::move(ring), slot, file}) {}
Lease::~Lease() { release(); }
bool Lease::valid() const { return !state_->released.load() && state_->ring->in_owner_process(); }
void Lease::release() { state_->ring->unpin_once(state_->slot, state_->released); }

MatrixView Lease::matrix(const std::string& name) const {
  state_->check_valid();
  const int tensor = find_tensor(state_->entry(), name);
  return view_at(state_->entry().tensors[static_cast<size_t>(tensor)], state_->ring->slot_data(state_->slot));
}

MatrixView Lease::matrix_in(const std::string& name, const void* data) const {
  const int tensor = find_tensor(state_->entry(), name);
  return view_at(state_->entry().tensors[static_cast<size_t>(tensor)], static_cast<const char*>(data));
}

const void* Lease::data() const {
  state_->check_valid();
  return state_->ring->slot_data(state_->slot);
}

int64_t Lease::file_bytes() const { return state_->entry().file_bytes; }

std::vector<std::string> Lease::names() const {
  std::vector<std::string> result;
  for (const TensorEntry& tensor : state_->entry().tensors) result.push_back(tensor.name);
  return result;
}

std::shared_ptr<const Lease> Lease::pin() const {
  if (!state_->ring->pin_unless(state_->slot, state_->released)) state_->check_valid();
  return std::make_shared<const Lease>(state_->ring, state_->slot, state_->file);
}

struct StoreReader::Impl {
  std::shared_ptr<Ring> ring;
  bool direct = true;
};

StoreReader::StoreReader(std::vector<FileEntry> files, int num_slots, bool direct)
    : StoreReader(std::move(files), num_slots, direct, open_direct_or_buffered) {}

StoreReader::StoreReader(std::vector<FileEntry> files, int num_slots, bool direct,
                         std::shared_ptr<const Pinning> pinning)
    : StoreReader(std::move(files), num_slots, direct, open_direct_or_buffered, std::move(pinning)) {}

StoreReader::StoreReader(std::vector<FileEntry> files, int num_slots, bool direct, const FileOpener& open_file,
                         std::shared_ptr<const Pinning> pinning)
    : impl_(new Impl) {
  if (files.empty()) throw InvalidArgument("a StoreReader needs at least one file");
  if (num_slots < 1) throw InvalidArgument("num_slots is " + std::to_string(num_slots) + ", expected at least 1");
  std::vector<std::unique_ptr<ReadFile>> handles;
  for (const FileEntry& entry : files) {
    check_file_entry(entry);
    handles.push_back(open_file(entry.path, direct));
    check_real_size(entry, *handles.back());
    impl_->direct = impl_->direct && handles.back()->direct();
  }
  impl_->ring = std::shared_ptr<Ring>(new Ring(std::move(files), std::move(handles), num_slots, std::move(pinning)),
                                      delete_in_owner_process);
}

StoreReader::~StoreReader() {
  if (impl_->ring->in_owner_process()) impl_->ring->stop();
}

void StoreReader::prefetch(int file) { impl_->ring->prefetch(file); }

std::shared_ptr<Lease> StoreReader::acquire(int file) {
  const int slot = impl_->ring->acquire(file);
  return std::make_shared<Lease>(impl_->ring, slot, file);
}

std::shared_ptr<Lease> StoreReader::try_acquire(int file) {
  const int slot = impl_->ring->try_acquire(file);
  return slot < 0 ? nullptr : std::make_shared<Lease>(impl_->ring, slot, file);
}

const TensorEntry& StoreReader::tensor(int file, const std::string& name) const {
  impl_->ring->check_file(file);
  const FileEntry& entry = impl_->ring->entry(file);
  return entry.tensors[static_cast<size_t>(find_tensor(entry, name))];
}

void StoreReader::gather_rows_from_disk(int file, const std::string& name, const int64_t* row_ids, int64_t num_ids,
                                        float* out) {
  const TensorEntry& wanted = tensor(file, name);
  Ring& ring = *impl_->ring;
  gather_rows_from_file({ring.handle(file), ring.entry(file).path, wanted, ring.bytes_read, ring.read_ns}, row_ids,
                        num_ids, out);
}

ReaderStats StoreReader::stats() const { return impl_->ring->stats(); }
int64_t StoreReader::slot_bytes() const { return impl_->ring->slot_bytes(); }
bool StoreReader::direct() const { return impl_->direct; }

}  // namespace chainfed
