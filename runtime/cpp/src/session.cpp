#include "session.hpp"

#include <algorithm>
#include <utility>

#include "error.hpp"
#include "process.hpp"

namespace stca::core {
namespace {

/// Most events that wait for a request; changing.py says why.
constexpr std::int64_t most_put_off = 256;

/// How many calls compute at once before they slow each other down.
int places(const Model& model, const Options& options) {
  const bool on_cpu = !model.engines().encoder->memory().device();
  return on_cpu && options.threads > 0 ? std::max(1, processors() / options.threads) : 1;
}

/// The place of the first event that is corrected, from the oldest, where `at` is negative too. Throws RequestError when
/// the events are not all within the history.
std::int64_t place(const UserState& kept, std::int64_t events, std::int64_t at) {
  const std::int64_t first = at < 0 ? at + kept.tokens : at, last = kept.tokens - events;
  if (first < 0 || first > last) {
    request_error("at: is ", at, "; the kept history has ", kept.tokens, " events, and all ", events,
                  " from there on must be in it");
  }
  return first;
}

}  // namespace

Session::Session(const std::string& path, Options options)
    : options_(std::move(options)),
      born_(process_number()),
      store_(std::make_unique<StateStore>(options_.keep)),
      model_(Model::load(path, options_, nullptr)),
      turns_(places(*model_, options_)) {
  if (!options_.state_folder.empty()) {
    const Engine& encoder = *model_->engines().encoder;
    if (model_->engines().encoder->memory().device()) {
      fail(STCA_USAGE_ERROR, "state_folder: is for engines on a CPU, not ", shown(encoder.name()), "; leave it out");
    }
    store_->open(options_.state_folder, options_.state_folder_bytes);
  }
  store_->serve(model_->state_kind());
}

Session::~Session() {
  if (process_number() == born_) return;
  // In a child, engines would wait for threads that only the parent has. They stay until the process goes.
  static auto* left = new std::vector<std::pair<ModelPtr, std::unique_ptr<StateStore>>>;
  left->emplace_back(std::move(model_), std::move(store_));
}

void Session::check_process() const {
  if (process_number() != born_) {
    fail(STCA_FORKED_ERROR,
         "this session was loaded before the process was forked, and its threads stayed behind; "
         "load a session of its own in each child");
  }
}

std::shared_ptr<const Model> Session::model() const {
  check_process();
  const std::lock_guard lock(mutex_);
  return model_;
}

bool Session::forget(const std::string& user) {
  check_process();
  return store_->forget(user);
}

std::optional<Residence> Session::residence(const std::string& user, const char* version) const {
  check_process();
  return store_->residence(user, version);
}

stca_cache_stats Session::stats() const {
  check_process();
  return store_->stats();
}

Scored Session::score(const std::vector<RequestView>& requests, const Deadline& deadline) {
  deadline.check();
  return score(*model(), requests, deadline);
}

Scored Session::score(const stca_request_batch& batch, const Deadline& deadline) {
  deadline.check();
  const ModelPtr model = this->model();
  const std::vector<CutRequest> cut = model->door().unpack(batch);
  std::vector<RequestView> requests;
  for (const CutRequest& r : cut) requests.push_back({{r.inputs.data(), r.inputs.size()}, r.user, r.version});
  return score(*model, requests, deadline);
}

/// One request on its way: what it brought, and the state it is scored with.
struct Session::Pending {
  const RequestView* request;
  Row row;
  std::optional<StateKey> key;  // under which the state is kept
  StateCache::State state;
  StateCache::FlightPtr flight;
  Came came = Came::new_user;
  std::uint64_t call = 0;
  bool has_history = false, hit = false;
};

/// Encodings that others may wait for: whatever happens, each of them ends.
class Session::Leading {
 public:
  explicit Leading(StateStore& store) : store_(store) {}
  Leading(const Leading&) = delete;
  Leading& operator=(const Leading&) = delete;
  ~Leading() {
    for (Pending* one : pending) {
      if (one->flight != nullptr) store_.land(one->flight, one->state);
    }
  }

  std::vector<Pending*> pending;

 private:
  StateStore& store_;
};

/// Hits by what others encode: counted while they wait, and taken back where nothing comes of it.
class Session::Joining {
 public:
  explicit Joining(StateStore& store) : store_(store) {}
  Joining(const Joining&) = delete;
  Joining& operator=(const Joining&) = delete;
  ~Joining() {
    if (hits_ != 0) store_.count(Came::joined, -hits_);
  }
  void add(std::int64_t hits) {
    store_.count(Came::joined, hits);
    hits_ += hits;
  }
  /// All came to something.
  void done() { hits_ = 0; }

 private:
  StateStore& store_;
  std::int64_t hits_ = 0;
};

void Session::look_up(const Model& model, Pending& one) {
  const Door& door = model.door();
  const RequestView& request = *one.request;
  const auto admit_history = [&] {
    door.admit(request.inputs, STCA_USER, STCA_REQUEST | STCA_TARGET, one.row);
    one.has_history = true;
  };
  if (request.user == nullptr && request.version != nullptr) {
    request_error("version: is ", in_quotes(request.version), " of no user; say whose history it is, or leave it out");
  }
  const bool named = request.user != nullptr && request.version != nullptr;
  if (!named) admit_history();
  if (request.user == nullptr) return;
  one.key = model.key(request.user, named ? request.version : door.digest(one.row));
  StateCache::LookedUp found = store_->look_up(*one.key);
  one.state = std::move(found.state);
  one.came = found.came;
  one.call = found.call;
  one.hit = one.state != nullptr;
  if (one.hit && named) check_version(model, one);
  if (one.hit || !named) return;
  if (!door.has_user_inputs() || door.any_user_input(request.inputs)) {
    admit_history();
  } else if (!store_->flying(*one.key)) {
    history_needed(request);
  }
}

void Session::check_version(const Model& model, const Pending& one) const {
  const RequestView& request = *one.request;
  if (!options_.check_versions || !model.door().any_user_input(request.inputs)) return;
  Row sent;
  model.door().admit(request.inputs, STCA_USER, STCA_REQUEST | STCA_TARGET, sent);
  if (one.state->history.empty() || one.state->history == model.door().digest(sent)) return;
  request_error("user ", in_quotes(request.user), ": the history sent is not the one that is kept as version ",
                in_quotes(request.version), "; give each history a version of its own");
}

void Session::encode(const Model& model, const std::vector<Pending*>& pending, const Deadline& deadline) const {
  std::vector<Row> rows;
  for (const Pending* one : pending) rows.push_back(one->row);
  model.encode(rows, deadline, [&](std::size_t i, std::shared_ptr<UserState> state) {
    if (options_.check_versions) state->history = model.door().digest(rows[i]);
    pending[i]->state = std::move(state);
  });
}

void Session::history_needed(const RequestView& request) {
  fail(STCA_HISTORY_NEEDED, "user ", in_quotes(request.user), ": no state of version ", in_quotes(request.version),
       " is kept; send the user inputs");
}

Scored Session::score(const Model& model, const std::vector<RequestView>& requests, const Deadline& deadline) {
  if (requests.size() > 1) model.door().check_packable();

  // Everything is checked before anything is computed, so a refused request leaves no trace.
  std::vector<Pending> pending;
  pending.reserve(requests.size());
  bool any = false;
  std::int64_t all = 0;
  for (const RequestView& request : requests) {
    Pending& one = pending.emplace_back(Pending{&request, {}, {}, nullptr, nullptr});
    model.door().admit(request.inputs, STCA_REQUEST | STCA_TARGET, STCA_USER, one.row);
    any = any || one.row.targets != 0;
    all += std::max<std::int64_t>(one.row.targets, 0);
  }
  if (!any) return {model.no_scores(), 0};  // nothing is run, and nobody encoded, for no scores
  if (requests.size() > 1) model.door().check_targets(all, "targets of all requests");
  for (Pending& one : pending) look_up(model, one);
  const Turns::Turn turn(turns_);
  find_states(model, pending, deadline);
  std::vector<StateCache::State> states;
  std::vector<Row> rows;
  std::size_t hits = 0;
  for (Pending& one : pending) {
    hits += one.hit ? 1 : 0;
    finish(model, one, deadline);
    states.push_back(std::move(one.state));
    rows.push_back(std::move(one.row));
  }
  return {model.score(states, rows, deadline), hits};
}

bool Session::find_state(Pending& one) {
  if (!one.key) return true;
  StateCache::Found found = store_->begin(*one.key, one.has_history, one.call);
  one.state = std::move(found.state);
  one.flight = std::move(found.flight);
  one.hit = !found.ours;
  if (one.state == nullptr && one.flight == nullptr) history_needed(*one.request);
  return found.ours;
}

void Session::find_states(const Model& model, std::vector<Pending>& pending, const Deadline& deadline) {
  for (const Pending& one : pending) {
    if (one.hit) store_->count(one.came, 1);
  }
  const auto count_encoding = [&](const Pending& one) {
    if (one.key) store_->count(one.came, 1);
  };
  Joining joining(*store_);
  std::vector<Pending*> waiting;
  {
    Leading leading(*store_);
    for (Pending& one : pending) {
      if (one.state != nullptr) continue;
      if (find_state(one)) {
        leading.pending.push_back(&one);
        continue;
      }
      joining.add(1);
      if (one.state == nullptr) waiting.push_back(&one);
    }
    for (const Pending* one : leading.pending) count_encoding(*one);
    encode(model, leading.pending, deadline);
  }
  // Waiting comes last: whoever waits has nothing left to do that another could be waiting for.
  for (Pending* one : waiting) {
    while (one->state == nullptr) {
      one->state = StateCache::wait(one->flight, deadline);
      if (one->state != nullptr) break;
      Leading leading(*store_);  // that encoding failed; perhaps with what this request brings it does not
      if (!find_state(*one)) continue;
      joining.add(-1);
      leading.pending.push_back(one);
      count_encoding(*one);
      encode(model, leading.pending, deadline);
    }
  }
  joining.done();
}

void Session::finish(const Model& model, Pending& one, const Deadline& deadline) {
  if (one.state->waiting == nullptr) return;
  deadline.check();
  const StateCache::State late = std::exchange(one.state, nullptr);
  while (one.state == nullptr) {
    StateCache::Found found = store_->begin(*one.key, true, 0, late);
    one.state = std::move(found.state);
    one.flight = std::move(found.flight);
    if (found.ours) {
      Leading leading(*store_);
      leading.pending.push_back(&one);
      one.state = model.finished(*late);
    } else if (one.state == nullptr) {
      one.state = StateCache::wait(one.flight, deadline);
    }
  }
}

bool Session::change(const std::string& user, Inputs events, const char* version, const char* after,
                     std::optional<std::int64_t> at) {
  const char* const call = at ? "amend" : "append";
  const ModelPtr model = this->model();
  if (version == nullptr) request_error("version: is null; name the history as it is then, or no request will find it");
  if (!model->manifest().appendable) {
    request_error(model->door().why_not_changeable(at.has_value()), "; send the whole history with a new version");
  }
  const bool grows = model->manifest().grows();
  if (grows && at) {
    request_error(call, ": this bundle's states are sums over all events, and what one of them gave is not known any "
                  "more; send the whole history with a new version");
  }
  Row row;
  model->door().admit_events(events, call, !at, row);  // what is corrected is never cut: the others would come early
  if (after != nullptr && std::string_view(after) == version) {
    request_error("version: is ", in_quotes(version), ", that of the history before; name the changed one anew");
  }
  const StateKey key = model->key(user, version);
  std::vector<StateKey> wanted{key};
  if (after != nullptr) wanted.push_back(model->key(user, after));
  while (true) {
    const auto held = store_->find(user, wanted);
    const std::uint64_t made_by = store_->next_call();
    if (!held || !(*held->first.kind == *model->state_kind())) return false;
    if (held->first.version == version) return true;  // the same call again, after a timeout perhaps: its events are in
    if (after != nullptr && held->first.version != after) return false;
    const std::int64_t all = held->second->tokens + std::max<std::int64_t>(row.tokens, 0);
    if (grows && model->window() && all > *model->window()) return false;  // the oldest would have to leave the sums
    if (store_->put(key, changed(*model, key, *held->second, row, at), held->second, made_by)) return true;
    // The same history may be there in another form: a request finished it, say. So once more, from what is there now.
    const auto now = store_->find(user, {});
    if (!now || !(now->first == held->first)) return false;
  }
}

StateCache::State Session::changed(const Model& model, const StateKey& key, const UserState& old, const Row& row,
                                   std::optional<std::int64_t> at) {
  const bool grows = model.manifest().grows();
  const std::int64_t first = at ? place(old, row.tokens, *at) : 0;
  const TensorSpec* const blank = model.door().only_blank(row);
  StateCache::State changed;
  if (grows) {
    changed = model.put_off(old, row);
    const bool may_wait = blank == nullptr && changed->waiting->tokens <= most_put_off;
    // A file holds what outlives the process, and so no state that is still to be finished.
    if (may_wait && !store_->on_file() && store_->fits(key, *changed)) return changed;
  }
  const Turns::Turn turn(turns_);
  if (grows) {
    changed = model.finished(*changed);
  } else {
    const StateCache::State fresh = model.encode(row);
    changed = at ? model.replace(old, *fresh, first) : model.extend(old, *fresh);
  }
  if (blank != nullptr && !model.gives_finite(changed)) {
    request_error(blank->name, ": with these events the history would hold nothing but ", *blank->blank,
                  ", for which the model has no finite score; send at least one other value");
  }
  return changed;
}

bool Session::warm(const std::string& user, Inputs history, const char* version, const Deadline& deadline) {
  deadline.check();
  const ModelPtr model = this->model();
  const RequestView request{history, user.c_str(), version};
  Pending one{&request, {}, {}, nullptr, nullptr};
  look_up(*model, one);
  if (one.state != nullptr && one.state->waiting == nullptr) return true;
  const Turns::Turn turn(turns_, deadline);
  while (one.state == nullptr) {
    Leading leading(*store_);
    if (find_state(one)) {
      leading.pending.push_back(&one);
      store_->count_warmed();
      encode(*model, leading.pending, deadline);
    } else if (one.state == nullptr) {
      one.state = StateCache::wait(one.flight, deadline);
    }
  }
  finish(*model, one, deadline);
  return store_->at_hand(*one.key);
}

void Session::swap(const std::string& path) {
  const ModelPtr served = model();
  ModelPtr next = Model::load(path, options_, &served->manifest());
  ModelPtr last;
  // Else, of two at once, one's model would be served and the other's states kept.
  const std::lock_guard swapping(swapping_);
  {
    const std::lock_guard lock(mutex_);
    last = std::exchange(model_, next);
  }
  store_->serve(next->state_kind());
}

}  // namespace stca::core
