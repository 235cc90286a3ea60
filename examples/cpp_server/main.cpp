// A scoring server that embeds stca: one line in, one line out, over TCP on the loopback address.
//
//   cpp_server BUNDLE [PORT] [tensorrt|onnxruntime|none]      (PORT 0, or none: a free one)
//
//   score USER VERSION NAME=1,2,3 …   ->  ok 0.5 0.25 …      ("-" for no user or no version)
//   append USER VERSION NAME=1,2 …    ->  ok kept            (or: ok nothing)
//   forget USER, swap BUNDLE, stats   ->  ok …
//   anything wrong                    ->  error 8 target_item: holds 1000 at [1]; it must be in [0, 999]
//
// Values are row by row. The engine `none` computes nothing and scores zero: for trying the protocol without a library.
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
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
      for (int a = 0; a < gives_[i].rank; ++a) {
        if (gives_[i].symbol[a] != nullptr) shape[a] = sizes[gives_[i].symbol[a]];
        bytes *= static_cast<std::size_t>(shape[a]);
      }
      std::memset(outputs.allocate(i, shape), 0, bytes);
    }
  }

 private:
  std::vector<stca_tensor_spec> takes_, gives_;
};

/// The `NAME=1,2,3` words of a line as tensors, with the memory they borrow.
class Tensors {
 public:
  Tensors(std::istream& words, const stca::Bundle& bundle) : bundle_(bundle) {
    for (std::string word; words >> word;) {
      const std::string name = word.substr(0, word.find('='));
      const auto specs = bundle_.inputs("request");
      const auto spec = std::find_if(specs.begin(), specs.end(), [&](const auto& s) { return name == s.name; });
      if (spec == specs.end() || name == word) throw refused(word + ": expected NAME=VALUES, of an input of the model");
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
      if (!(in >> values.emplace_back()) || (in.get() != ',' && !in.eof())) throw refused(text + ": not numbers");
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
    out << "ok hits " << s.hits << " misses " << s.misses << " users " << s.users << " bytes " << s.bytes;
  } else {
    out << "error " << STCA_REQUEST_ERROR << ' ' << verb << ": expected score, append, forget, swap or stats";
  }
  return out.str();
} catch (const stca::StcaError& e) {
  return "error " + std::to_string(e.code()) + " " + e.what();
}

void serve(stca::Session& session, int connection) {
  std::string pending;
  char buffer[1 << 16];
  for (ssize_t n; (n = read(connection, buffer, sizeof buffer)) > 0 && pending.size() < (1 << 20);) {
    pending.append(buffer, static_cast<std::size_t>(n));
    for (std::size_t end; (end = pending.find('\n')) != std::string::npos; pending.erase(0, end + 1)) {
      const std::string reply = answer(session, pending.substr(0, end)) + "\n";
      send(connection, reply.data(), reply.size(), MSG_NOSIGNAL);
    }
  }
  close(connection);
}

int main(int argc, char** argv) try {
  if (argc < 2) return std::cerr << "usage: cpp_server BUNDLE [PORT] [tensorrt|onnxruntime|none]\n", 2;
  std::uint16_t port = 0;
  const char* given = argc > 2 ? argv[2] : "0";
  if (const auto [end, error] = std::from_chars(given, given + std::strlen(given), port); error != std::errc() || *end)
    return std::cerr << "'" << given << "' is no port; give a number from 1 to 65535, or 0 for a free one\n", 2;
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
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  auto* raw = reinterpret_cast<sockaddr*>(&address);
  if (bind(listener, raw, size) != 0 || listen(listener, 64) != 0) return std::perror("cannot listen"), 1;
  getsockname(listener, raw, &size);
  std::cout << "127.0.0.1:" << ntohs(address.sin_port) << ", engine " << session.engine("target_scorer") << std::endl;
  for (int connection; (connection = accept(listener, nullptr, nullptr)) >= 0;)
    std::thread(serve, std::ref(session), connection).detach();
} catch (const stca::StcaError& e) {
  return std::cerr << e.what() << "\n", 1;
}
