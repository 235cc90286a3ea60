// A scoring server that embeds stca: one line in, one line out, over TCP on the loopback address.
//
//   cpp_server BUNDLE [PORT] [tensorrt|onnxruntime|none] [SECONDS]      (PORT 0, or none: a free one)
//
//   score USER VERSION NAME=1,2,3 …   ->  ok 0.5 0.25 …      ("-" for no user or no version)
//   append USER VERSION NAME=1,2 …    ->  ok kept            (or: ok nothing)
//   forget USER, swap BUNDLE, stats   ->  ok …
//   anything wrong                    ->  error 8 target_item: holds 1000 at [1]; it must be in [0, 999]
//
// Values are row by row. The engine `none` computes nothing and scores zero: for trying the protocol without a library.
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstring>
#include <iostream>
#include <list>
#include <map>
#include <sstream>
#include <stca/runtime.hpp>
#include <thread>

class NoEngine : public stca::Engine {
 public:
  NoEngine(const stca::Bundle& bundle, const std::string& graph)
      : takes_(bundle.inputs(graph)), gives_(bundle.outputs(graph)) {}
  std::string name() const override { return "none (computes nothing, scores zero)"; }
  void run(const stca_tensor* inputs, std::size_t count, stca::Outputs& outputs) override {
    std::map<std::string, std::int64_t> sizes;
    for (std::size_t i = 0; i < count; ++i)
      for (int a = 0; a < takes_[i].rank; ++a)
        if (takes_[i].symbol[a] != nullptr) sizes[takes_[i].symbol[a]] = inputs[i].shape[a];
    for (std::size_t i = 0; i < gives_.size(); ++i) {
      std::vector<std::int64_t> shape(gives_[i].shape, gives_[i].shape + gives_[i].rank);
      std::size_t bytes = stca_dtype_bytes(gives_[i].dtype);
      for (std::size_t a = 0; a < shape.size(); ++a) {
        if (gives_[i].symbol[a] != nullptr) shape[a] = sizes[gives_[i].symbol[a]];
        bytes *= static_cast<std::size_t>(shape[a]);
      }
      std::memset(outputs.allocate(i, shape), 0, bytes);
    }
  }

 private:
  std::vector<stca_tensor_spec> takes_, gives_;
};

/// A client's text in an answer: cut, in quotes, and nothing in it that moves a cursor or ends a line.
std::string quoted(const std::string& text) {
  std::string line = "'";
  for (const char c : text.substr(0, 60)) line += c >= ' ' && c <= '~' ? c : '?';
  return line + (text.size() > 60 ? "...'" : "'");
}

/// The `NAME=1,2,3` words of a line as tensors, with the memory they borrow.
class Tensors {
 public:
  Tensors(std::istream& words, const stca::Bundle& bundle) : bundle_(bundle) {
    for (std::string word; words >> word;) {
      const std::string name = word.substr(0, word.find('='));
      const auto specs = bundle_.inputs("request");
      const auto spec = std::find_if(specs.begin(), specs.end(), [&](const auto& s) { return name == s.name; });
      if (spec == specs.end() || name == word)
        throw refused(quoted(word) + ": expected NAME=VALUES, of an input of the model");
      const bool real = spec->dtype >= STCA_FLOAT16 && spec->dtype <= STCA_FLOAT64;
      const std::string text = word.substr(name.size() + 1);
      real ? add(*spec, text, reals_.emplace_back()) : add(*spec, text, integers_.emplace_back());
    }
  }
  std::vector<stca::Tensor> list;

 private:
  static stca::RequestError refused(const std::string& why) { return {STCA_REQUEST_ERROR, why}; }
  template <class T>
  void add(const stca_tensor_spec& spec, const std::string& text, std::vector<T>& values) {
    for (std::istringstream in(text); in.peek() != EOF;)
      if (!(in >> values.emplace_back()) || (in.get() != ',' && !in.eof()))
        throw refused(quoted(text) + ": not numbers");
    std::vector<std::int64_t> shape(spec.shape, spec.shape + spec.rank);
    std::int64_t count = static_cast<std::int64_t>(values.size()), width = 1;
    for (std::size_t a = 1; a < shape.size(); ++a) width *= std::max<std::int64_t>(shape[a], 1);
    if (!shape.empty()) shape[0] = count / width;
    if (shape.empty() ? count != 1 : count % width != 0) shape = {count};  // the session refuses it and says why
    list.emplace_back(spec.name, stca::detail::DTypeOf<T>::value, values.data(), shape);
  }
  stca::Bundle bundle_;  // the names live in it
  std::list<std::vector<std::int64_t>> integers_;
  std::list<std::vector<double>> reals_;
};

std::string answer(stca::Session& session, const std::string& line) try {
  std::istringstream words(line);
  std::ostringstream out;
  out.precision(9);
  std::string verb, user, version;
  if (words >> verb; verb == "score" || verb == "append") {
    words >> user >> version;
    const Tensors tensors(words, session.bundle());
    if (verb == "append") return session.append(user, tensors.list, version) ? "ok kept" : "ok nothing";
    const auto named = [](const std::string& word) { return word == "-" ? std::nullopt : std::optional(word); };
    out << "ok";
    for (float score : session.score(stca::Request{tensors.list, named(user), named(version)})) out << ' ' << score;
  } else if (verb == "forget" && words >> user) {
    return session.forget(user) ? "ok kept" : "ok nothing";
  } else if (verb == "swap" && words >> user) {
    session.swap(user);
    out << "ok " << session.bundle().weights();
  } else if (verb == "stats") {
    const stca::CacheStats s = session.stats();
    out << "ok hits " << s.hits << " misses " << s.misses << " users " << s.users << " bytes " << s.state_bytes;
  } else {
    out << "error " << STCA_REQUEST_ERROR << ' ' << quoted(verb) << ": expected score, append, forget, swap or stats";
  }
  return out.str();
} catch (const stca::StcaError& e) {
  return "error " + std::to_string(e.code()) + " " + e.what();
} catch (const std::exception& e) {
  return "error " + std::to_string(STCA_INTERNAL_ERROR) + " " + e.what();
}

using Clock = std::chrono::steady_clock;

/// Connections, each with a thread of its own: no more than `most`, none that is silent, or takes over a line or over
/// reading an answer, for longer than so many seconds.
class Connections {
 public:
  static constexpr std::size_t most = 64;

  Connections(stca::Session& session, int seconds) : session_(session), seconds_(seconds) {}
  Connections(const Connections&) = delete;
  Connections& operator=(const Connections&) = delete;
  ~Connections() {  // when the server ends: what is under way is answered to whoever reads, and nothing more is read
    for (auto& one : all_) shutdown(one.socket, SHUT_RD);
    const auto last = Clock::now() + std::chrono::seconds(2);
    for (auto& one : all_)
      while (!one.done && Clock::now() < last) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    for (auto& one : all_) shutdown(one.socket, SHUT_RDWR);
    for (auto& one : all_) end(one);
  }

  /// Gives back the descriptors and threads of connections that ended.
  void clear() {
    for (auto one = all_.begin(); one != all_.end();) one->done ? (end(*one), one = all_.erase(one)) : ++one;
  }

  void add(int socket) {
    const timeval limit{seconds_, 0};
    setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (all_.size() >= most) {
      reply(socket, "error 0 busy: " + std::to_string(most) + " connections are open; try again later");
      close(socket);
      return;
    }
    One& one = all_.emplace_back(socket);
    try {
      one.thread = std::thread([this, &one] { serve(one); });
    } catch (const std::system_error&) {  // no thread to be had: this client goes, the others stay
      close(socket);
      all_.pop_back();
    }
  }

 private:
  struct One {
    explicit One(int s) : socket(s) {}
    int socket;
    std::atomic<bool> done{false};
    std::thread thread;
  };

  static void end(One& one) {
    one.thread.join();
    close(one.socket);
  }
  static bool reply(int socket, std::string line) {
    line += '\n';
    for (std::size_t sent = 0; sent < line.size();) {
      const ssize_t n = send(socket, line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
      if (n <= 0) return false;
      sent += static_cast<std::size_t>(n);
    }
    return true;
  }
  void serve(One& one) try {
    constexpr std::size_t longest = 1 << 20;
    std::string pending;
    std::vector<char> buffer(1 << 16);
    bool open = true;
    Clock::time_point begun;  // when the line did that is not whole yet
    for (ssize_t n; open && (n = read(one.socket, buffer.data(), buffer.size())) > 0;) {
      if (pending.empty()) begun = Clock::now();
      pending.append(buffer.data(), static_cast<std::size_t>(n));
      for (std::size_t end; open && (end = pending.find('\n')) != std::string::npos; pending.erase(0, end + 1)) {
        open = reply(one.socket, answer(session_, pending.substr(0, end)));
        begun = Clock::now();
      }
      if (!pending.empty() && Clock::now() - begun > std::chrono::seconds(seconds_))
        open = reply(one.socket, "error 8 line: did not end in time") && false;
      if (pending.size() > longest) open = reply(one.socket, "error 8 line: is longer than 1 MiB") && false;
    }
    shutdown(one.socket, SHUT_RDWR);
    one.done = true;
  } catch (const std::exception&) {  // out of memory: this client goes, the others stay
    shutdown(one.socket, SHUT_RDWR);
    one.done = true;
  }

  stca::Session& session_;
  const int seconds_;
  std::list<One> all_;
};

volatile std::sig_atomic_t stopped = 0;

/// Takes connections until SIGINT or SIGTERM. Where the process is out of descriptors, it waits until some are free.
int take(int listener, stca::Session& session, int seconds) {
  Connections connections(session, seconds);
  for (const auto stop : {SIGINT, SIGTERM}) {
    struct sigaction action{};
    action.sa_handler = [](int) { stopped = 1; };  // without SA_RESTART, so that poll returns
    sigaction(stop, &action, nullptr);
  }
  while (stopped == 0) {
    connections.clear();  // here, since a process without a free descriptor takes nobody
    pollfd waiting{listener, POLLIN, 0};
    if (poll(&waiting, 1, 1000) <= 0) continue;
    const int connection = accept(listener, nullptr, nullptr);
    if (connection >= 0) {
      connections.add(connection);
    } else if (errno == EBADF || errno == EINVAL || errno == ENOTSOCK) {
      return std::perror("cannot accept connections"), 1;
    } else if (errno != EINTR && errno != EAGAIN) {  // no descriptor or memory to be had now, or a client that is gone
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  }
  return 0;
}

/// Whether all of `text` is a number.
template <class Number>
bool is_number(const char* text, Number& number) {
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), number);
  return error == std::errc() && *end == '\0';
}

int main(int argc, char** argv) try {
  if (argc < 2) return std::cerr << "usage: cpp_server BUNDLE [PORT] [tensorrt|onnxruntime|none] [SECONDS]\n", 2;
  std::uint16_t port = 0;
  int seconds = 30;
  if (argc > 2 && !is_number(argv[2], port))
    return std::cerr << quoted(argv[2]) << " is no port; give a number from 1 to 65535, or 0 for a free one\n", 2;
  if (argc > 4 && (!is_number(argv[4], seconds) || seconds < 1))
    return std::cerr << quoted(argv[4]) << " are no seconds; give a number from 1\n", 2;
  stca::Options options;
  if (argc > 3) options.engine = argv[3];
  const auto none = [](const stca::Bundle& b, const std::string& g) { return std::make_unique<NoEngine>(b, g); };
  if (options.engine == "none") options.make_engine = none;
  stca::Session session = stca::Session::load(argv[1], options);
  sockaddr_in address{};
  socklen_t size = sizeof address;
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  auto* raw = reinterpret_cast<sockaddr*>(&address);
  if (bind(listener, raw, size) != 0 || listen(listener, 64) != 0) return std::perror("cannot listen"), 1;
  getsockname(listener, raw, &size);
  std::cout << "127.0.0.1:" << ntohs(address.sin_port) << ", engine " << session.engine("target_scorer") << std::endl;
  return take(listener, session, seconds);
} catch (const std::exception& e) {
  return std::cerr << e.what() << "\n", 1;
}
