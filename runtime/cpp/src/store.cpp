#include "store.hpp"

namespace stca::core {

void StateStore::open(const std::string& folder, std::uint64_t bytes) {
  file_ = std::make_unique<FileTier>(folder, bytes, seconds_, [this](const std::string& user) { return memory_.fetch(user); });
}

StateCache::LookedUp StateStore::look_up(const StateKey& key) {
  const std::uint64_t call = next_call();  // before it looks: what it does not see was made by a later one
  StateCache::LookedUp found = memory_.get(key);
  found.call = call;
  if (found.state != nullptr || file_ == nullptr) return found;
  auto [state, damaged] =
      file_->read(key, [&](const State& read, double age, std::uint64_t made) { memory_.restore(key, read, age, made); });
  if (state != nullptr) return {std::move(state), Came::file, call};
  if (damaged) return {nullptr, Came::damaged, call};
  const bool unknown = found.came == Came::new_user || found.came == Came::evicted;
  return {nullptr, unknown && file_->bytes_of(key.user) ? Came::version : found.came, call};
}

std::optional<std::pair<StateKey, StateStore::State>> StateStore::find(const std::string& user,
                                                                      const std::vector<StateKey>& wanted) {
  auto held = memory_.find(user);
  for (const StateKey& key : wanted) {
    if (held || file_ == nullptr) break;
    if (look_up(key).state != nullptr) held = memory_.find(user);
  }
  return held;
}

std::optional<Residence> StateStore::residence(const std::string& user, const char* version) {
  if (const auto held = memory_.find(user); held && (version == nullptr || held->first.version == version)) {
    return Residence{STCA_IN_MEMORY, cost_of(held->first, *held->second), held->first.version};
  }
  const auto on_file = file_ == nullptr ? std::nullopt : file_->bytes_of(user, version);
  if (!on_file) return std::nullopt;
  return Residence{STCA_IN_FILE, *on_file, version == nullptr ? std::nullopt : std::optional<std::string>(version)};
}

bool StateStore::put(StateKey key, State state, const State& instead_of, std::uint64_t call) {
  const std::string user = key.user;
  const bool kept = memory_.put(std::move(key), std::move(state), instead_of, call);
  if (kept && file_ != nullptr) file_->offer(user);
  return kept;
}

void StateStore::land(const StateCache::FlightPtr& flight, State state) {
  // Not within: the folder's lock is taken before the memory's.
  if (memory_.land(flight, std::move(state)) && file_ != nullptr) file_->offer(flight->user());
}

bool StateStore::forget(const std::string& user) {
  if (file_ == nullptr) return memory_.forget(user);
  const bool on_file = file_->forget(user), in_memory = memory_.forget(user);
  file_->forget(user);  // what was being written of it in between
  return on_file || in_memory;
}

void StateStore::serve(const std::shared_ptr<const StateKind>& kind) {
  memory_.serve(kind);
  if (file_ != nullptr) file_->serve(*kind);
}

stca_cache_stats StateStore::stats() {
  stca_cache_stats stats = memory_.stats();
  if (file_ == nullptr) return stats;
  const FileStats file = file_->stats();
  stats.file_users = file.users;
  stats.file_bytes = file.bytes;
  stats.file_budget = file.budget;
  stats.file_reads = file.reads;
  stats.file_writes = file.writes;
  stats.file_written_bytes = file.written_bytes;
  stats.file_evictions = file.evictions;
  stats.file_expired = file.expired;
  stats.file_skipped = file.skipped;
  stats.file_discarded = file.discarded;
  stats.file_failed = file.failed;
  stats.file_waiting = file.waiting;
  stats.file_read_seconds = file.read_seconds;
  return stats;
}

}  // namespace stca::core
