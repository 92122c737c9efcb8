// A load generator for gRPC without TLS: sends a schedule, or keeps so many callers busy, from one thread.
//
// Decides when each call is sent and how it ended. Must never know what a request or an answer says: requests come as
// finished messages behind a finished header block, answers and trailers go back as they came. What it measures runs on
// the same cores, so that a call costs some ten system calls and no allocation that could be spared: on a machine whose
// cores compute meanwhile, a client in Python cost as much as what it measured.
//
// The dynamic table of header compression is refused in the first SETTINGS, so that every block can be read by itself.
// Both directions keep to flow control; a call that is given up is reset; a connection that says GOAWAY ends what it
// has, and the next call opens another. Sources: RFC 9113 and 7541, gRPC over HTTP/2.

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

enum Frame : uint8_t { DATA, HEADERS, PRIORITY_, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION };
constexpr uint8_t END_STREAM = 0x1, ACK = 0x1, END_HEADERS = 0x4, PADDED = 0x8, PRIORITY = 0x20;
enum Setting : uint16_t { HEADER_TABLE_SIZE = 1, MAX_CONCURRENT_STREAMS = 3, INITIAL_WINDOW_SIZE = 4, MAX_FRAME_SIZE = 5 };
constexpr uint32_t WINDOW = 0x7fffffff;
constexpr uint32_t LAST_STREAM = WINDOW - 1000;  // numbers of streams end there
constexpr uint32_t GIVE_BACK = 1u << 28;         // bytes after which the server is told that its answers were read
constexpr uint32_t CANCEL = 8;
constexpr double OPEN_S = 10.0;           // from a connection's begin until its server has said its settings
constexpr double AGAIN_S = 0.01;          // from a connection that failed to the next in its place
constexpr int BREATH = 64;                // calls begun in one go when behind; then what came in is read
constexpr int EVENTS = 64;
constexpr size_t READ_BYTES = 1 << 18;
const char PREFACE[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const char GOOD[] = "\x0bgrpc-status\x01" "0";  // a literal name, and a value of one digit
constexpr size_t GOOD_SIZE = sizeof GOOD - 1;

enum Ending : uint16_t { TRAILERS, RESET, LOST, GAVE_UP, NO_CONNECTION, NO_TRAILERS };

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

uint32_t read32(const uint8_t* p) { return uint32_t(p[0]) << 24 | uint32_t(p[1]) << 16 | uint32_t(p[2]) << 8 | p[3]; }

void put(std::string& to, uint64_t value, int bytes) {
  for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8) to.push_back(char(value >> shift));
}

void put_frame(std::string& to, uint8_t kind, uint8_t flags, uint32_t stream, const void* payload, size_t size) {
  put(to, size, 3);
  put(to, kind, 1);
  put(to, flags, 1);
  put(to, stream, 4);
  to.append(static_cast<const char*>(payload), size);
}

void put_frame32(std::string& to, uint8_t kind, uint32_t stream, uint32_t value) {
  std::string payload;
  put(payload, value, 4);
  put_frame(to, kind, 0, stream, payload.data(), 4);
}

}  // namespace

extern "C" {

struct Row {  // of one call; native_client.py has the same as a numpy type
  double meant, sent, first, ended;  // seconds since the start; first: of the first DATA, 0 without
  uint64_t blob_at;                  // header block that was not a plain 200, then the last block, then DATA
  uint32_t head_size, tail_size, body_size;
  uint32_t request;
  uint32_t value;  // of RESET: the code
  uint16_t phase, ending;
};

struct Closed {
  double begins, ends;
  uint32_t callers, phase;
};

struct Plan {
  const char *host, *port;
  const uint8_t* head;  // the header block of every call
  const uint8_t* const* requests;
  const uint32_t* sizes;
  const double* arrivals;
  const uint16_t* phases;
  const Closed* closed;
  uint64_t turn, step;  // the first request, and how many further the next one is
  uint64_t arrival_count;
  double start;      // of CLOCK_MONOTONIC
  double ends;       // since the start: no call is waited for any longer
  double give_up_s;  // a call is reset so long after it was sent; 0: never
  uint32_t head_size, request_count, closed_count, connections, in_flight_max;
  uint32_t keep;  // whether DATA is kept
};
}

namespace {

struct Call {
  double meant, sent, first;
  const uint8_t* body;  // what is left to send
  uint32_t left;
  uint32_t request, stream, generation;
  int64_t window;
  int32_t caller;  // of a closed loop, -1 otherwise
  uint16_t phase;
  bool active;
  struct Connection* connection;
  std::string head, data;
};

struct Connection {
  int fd = -1;
  uint32_t slot = 0;
  bool connected = false, ready = false, leaving = false, dead = false, wants_out = false, block_ends = false;
  double opened = 0;
  uint32_t next = 1, streams_max = WINDOW, frame_max = 16384, unread = 0, block_stream = 0;
  int64_t window = 65535, stream_window = 65535;
  std::string out, in, block;
  std::unordered_map<uint32_t, uint32_t> streams;  // to the number of a call
  std::deque<uint32_t> waiting;                    // calls that have no stream yet
  std::deque<uint32_t> held;                       // calls that have more to send than the server takes now
};

struct Slot {
  Connection* connection = nullptr;
  double not_before = 0;
};

struct Due {  // a call may have ended and its number been given to another
  double at;
  uint32_t call, generation;
};

}  // namespace

struct Volley {
  explicit Volley(const Plan& given) : plan(given), slots(given.connections) {}
  ~Volley() {
    for (auto& connection : connections)
      if (connection->fd >= 0) close(connection->fd);
    if (epoll >= 0) close(epoll);
    if (clock >= 0) close(clock);
    if (address) freeaddrinfo(address);
  }

  int run();
  void take(std::vector<Row>& rows_out, std::string& blobs_out) {
    std::lock_guard<std::mutex> held(lock);
    rows_out.swap(rows);
    blobs_out.swap(blobs);
    rows.clear();
    blobs.clear();
  }

  std::atomic<uint64_t> unsent{0}, ended{0}, failed{0}, kept_bytes{0};
  std::atomic<bool> stopped{false};
  std::vector<Row> taken;
  std::string taken_blobs;

 private:
  void begin(double meant, uint16_t phase, int32_t caller);
  void give(uint32_t number, uint32_t slot);
  Connection* open_in(uint32_t slot);
  void ready(Connection& c);
  void submit(Connection& c, uint32_t number);
  void send_held(Connection& c);
  void next_waiting(Connection& c);
  void flush(Connection& c);
  void readable(Connection& c);
  void frame(Connection& c, uint8_t kind, uint8_t flags, uint32_t stream, const uint8_t* p, uint32_t size);
  void headers(Connection& c, uint8_t kind, uint8_t flags, uint32_t stream, const uint8_t* p, uint32_t size);
  void settings(Connection& c, const uint8_t* p, uint32_t size);
  void settle(uint32_t number, Ending ending, uint32_t value = 0, const char* tail = nullptr, size_t tail_size = 0);
  void lose(Connection& c, Ending of_waiting);
  void reset(Connection& c, uint32_t stream);
  void expire(double t);
  double work(double t);
  double sleep_until(double t) const;
  bool done(double t) const;
  void set_clock(double at);

  Plan plan;
  addrinfo* address = nullptr;
  int epoll = -1, clock = -1;
  double clock_at = -1;
  std::vector<Slot> slots;
  std::vector<std::unique_ptr<Connection>> connections;
  std::vector<std::deque<Due>> queued;  // calls for a slot that may not connect yet
  std::deque<Call> calls;
  std::vector<uint32_t> spare;
  std::deque<Due> due;
  std::vector<Connection*> unflushed;
  std::vector<std::pair<uint32_t, bool>> phases_begun;  // of closed phases
  std::vector<std::pair<uint16_t, int32_t>> free_callers;
  uint64_t turn = 0, which_slot = 0, next_arrival = 0;
  uint32_t in_flight = 0;
  std::mutex lock;
  std::vector<Row> rows;
  std::string blobs;
  std::vector<uint8_t> buffer = std::vector<uint8_t>(READ_BYTES);
};

// -------------------------------------------------------------------------------------------------------------- calls

void Volley::begin(double meant, uint16_t phase, int32_t caller) {
  const uint32_t request = uint32_t(turn % plan.request_count);
  turn += plan.step;
  uint32_t number;
  if (spare.empty()) {
    number = uint32_t(calls.size());
    calls.emplace_back();
    calls.back().generation = 0;
  } else {
    number = spare.back();
    spare.pop_back();
  }
  Call& call = calls[number];
  call.sent = now() - plan.start;
  call.meant = meant < 0 ? call.sent : meant;
  call.first = 0;
  call.request = request;
  call.body = plan.requests[request];
  call.left = plan.sizes[request];
  call.caller = caller;
  call.phase = phase;
  call.stream = 0;
  call.active = true;
  call.connection = nullptr;
  call.head.clear();
  call.data.clear();
  ++in_flight;
  if (plan.give_up_s > 0) due.push_back({call.sent + plan.give_up_s, number, call.generation});
  give(number, uint32_t(which_slot++ % slots.size()));
}

void Volley::give(uint32_t number, uint32_t slot) {
  Connection* c = slots[slot].connection;
  if (c == nullptr || c->dead || c->leaving || c->next > LAST_STREAM) {
    if (now() - plan.start < slots[slot].not_before) {
      queued[slot].push_back({0, number, calls[number].generation});
      return;
    }
    c = open_in(slot);
    if (c == nullptr) {
      settle(number, NO_CONNECTION);
      return;
    }
  }
  calls[number].connection = c;
  if (c->ready && c->waiting.empty() && c->streams.size() < c->streams_max)
    submit(*c, number);
  else
    c->waiting.push_back(number);
}

Connection* Volley::open_in(uint32_t slot) {
  slots[slot].connection = nullptr;
  slots[slot].not_before = now() - plan.start + AGAIN_S;
  auto made = std::make_unique<Connection>();
  Connection& c = *made;
  c.slot = slot;
  c.opened = now() - plan.start;
  c.fd = socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (c.fd < 0) return nullptr;
  const int yes = 1;
  setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  if (connect(c.fd, address->ai_addr, address->ai_addrlen) != 0 && errno != EINPROGRESS) {
    close(c.fd);
    return nullptr;
  }
  c.out.append(PREFACE, sizeof PREFACE - 1);
  std::string own;
  put(own, HEADER_TABLE_SIZE, 2);
  put(own, 0, 4);
  put(own, INITIAL_WINDOW_SIZE, 2);
  put(own, WINDOW, 4);
  put_frame(c.out, SETTINGS, 0, 0, own.data(), own.size());
  put_frame32(c.out, WINDOW_UPDATE, 0, WINDOW - 65535);
  c.wants_out = true;
  epoll_event event{EPOLLIN | EPOLLOUT, {&c}};
  epoll_ctl(epoll, EPOLL_CTL_ADD, c.fd, &event);
  connections.push_back(std::move(made));
  slots[slot].connection = &c;
  return &c;
}

void Volley::submit(Connection& c, uint32_t number) {
  Call& call = calls[number];
  if (c.out.empty()) unflushed.push_back(&c);
  call.stream = c.next;
  call.window = c.stream_window;
  c.next += 2;
  c.streams.emplace(call.stream, number);
  put_frame(c.out, HEADERS, END_HEADERS, call.stream, plan.head, plan.head_size);
  c.held.push_back(number);
  send_held(c);
}

void Volley::send_held(Connection& c) {  // oldest stream first
  for (auto at = c.held.begin(); at != c.held.end();) {
    Call& call = calls[*at];
    while (call.left) {
      const int64_t size = std::min({int64_t(call.left), c.window, call.window, int64_t(c.frame_max)});
      if (size <= 0) break;
      if (c.out.empty()) unflushed.push_back(&c);
      c.window -= size;
      call.window -= size;
      call.left -= uint32_t(size);
      put_frame(c.out, DATA, call.left ? 0 : END_STREAM, call.stream, call.body, size_t(size));
      call.body += size;
    }
    at = call.left ? at + 1 : c.held.erase(at);
    if (c.window <= 0) return;
  }
}

void Volley::next_waiting(Connection& c) {
  while (c.ready && !c.leaving && !c.dead && !c.waiting.empty() && c.streams.size() < c.streams_max) {
    const uint32_t number = c.waiting.front();
    c.waiting.pop_front();
    submit(c, number);
  }
}

void Volley::settle(uint32_t number, Ending ending, uint32_t value, const char* tail, size_t tail_size) {
  Call& call = calls[number];
  Connection* c = call.connection;
  if (c != nullptr) {
    if (call.stream) {
      c->streams.erase(call.stream);
      if (call.left) {  // the server has answered before it had read all
        c->held.erase(std::remove(c->held.begin(), c->held.end(), number), c->held.end());
        if (ending != GAVE_UP && ending != RESET && !c->dead) reset(*c, call.stream);
      }
    } else {
      c->waiting.erase(std::remove(c->waiting.begin(), c->waiting.end(), number), c->waiting.end());
    }
  }
  {
    std::lock_guard<std::mutex> held(lock);
    rows.push_back({call.meant, call.sent, call.first, now() - plan.start, blobs.size(), uint32_t(call.head.size()),
                    uint32_t(tail_size), uint32_t(call.data.size()), call.request, value, call.phase, ending});
    blobs.append(call.head);
    if (tail_size) blobs.append(tail, tail_size);
    blobs.append(call.data);
    kept_bytes = blobs.size() + rows.size() * sizeof(Row);
  }
  ++ended;
  if (ending != TRAILERS || tail_size != GOOD_SIZE) ++failed;
  if (call.caller >= 0) free_callers.emplace_back(call.phase, call.caller);
  call.active = false;
  ++call.generation;
  spare.push_back(number);
  --in_flight;
  if (c != nullptr) next_waiting(*c);
}

void Volley::reset(Connection& c, uint32_t stream) {
  if (c.out.empty()) unflushed.push_back(&c);
  put_frame32(c.out, RST_STREAM, stream, CANCEL);
}

void Volley::lose(Connection& c, Ending of_waiting) {
  if (c.dead) return;
  c.dead = true;
  epoll_ctl(epoll, EPOLL_CTL_DEL, c.fd, nullptr);
  close(c.fd);
  c.fd = -1;
  while (!c.streams.empty()) settle(c.streams.begin()->second, LOST);
  while (!c.waiting.empty()) settle(c.waiting.front(), of_waiting);
}

void Volley::expire(double t) {
  while (!due.empty()) {
    const Due& first = due.front();
    Call& call = calls[first.call];
    if (call.generation == first.generation) {
      if (first.at > t) return;
      if (call.connection != nullptr && call.stream && !call.connection->dead) reset(*call.connection, call.stream);
      settle(first.call, GAVE_UP);
    }
    due.pop_front();
  }
}

// --------------------------------------------------------------------------------------------------------- connection

void Volley::flush(Connection& c) {
  size_t sent = 0;
  while (!c.dead && c.connected && sent < c.out.size()) {
    const ssize_t n = send(c.fd, c.out.data() + sent, c.out.size() - sent, MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN) {
        lose(c, LOST);
        return;
      }
      break;
    }
    sent += size_t(n);
  }
  c.out.erase(0, sent);
  const bool wants = !c.out.empty();
  if (!c.dead && wants != c.wants_out) {
    c.wants_out = wants;
    epoll_event event{uint32_t(wants ? EPOLLIN | EPOLLOUT : EPOLLIN), {&c}};
    epoll_ctl(epoll, EPOLL_CTL_MOD, c.fd, &event);
  }
}

void Volley::readable(Connection& c) {
  const ssize_t n = recv(c.fd, buffer.data(), buffer.size(), 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) {
    lose(c, c.ready ? LOST : NO_CONNECTION);
    return;
  }
  const bool joined = !c.in.empty();
  if (joined) c.in.append(reinterpret_cast<const char*>(buffer.data()), size_t(n));
  const uint8_t* const begin = joined ? reinterpret_cast<const uint8_t*>(c.in.data()) : buffer.data();
  const uint8_t* at = begin;
  size_t left = joined ? c.in.size() : size_t(n);
  while (left >= 9 && !c.dead) {
    const uint32_t size = uint32_t(at[0]) << 16 | uint32_t(at[1]) << 8 | at[2];
    if (left < 9 + size) break;
    frame(c, at[3], at[4], read32(at + 5) & WINDOW, at + 9, size);
    at += 9 + size;
    left -= 9 + size;
  }
  if (joined)
    c.in.erase(0, size_t(at - begin));
  else
    c.in.assign(reinterpret_cast<const char*>(at), left);
}

void Volley::frame(Connection& c, uint8_t kind, uint8_t flags, uint32_t stream, const uint8_t* p, uint32_t size) {
  if (!c.ready && kind != SETTINGS) {  // it speaks something else
    lose(c, NO_CONNECTION);
    return;
  }
  const auto found = c.streams.find(stream);
  Call* call = found == c.streams.end() ? nullptr : &calls[found->second];
  switch (kind) {
    case DATA: {
      c.unread += size;
      if (c.unread >= GIVE_BACK) {
        if (c.out.empty()) unflushed.push_back(&c);
        put_frame32(c.out, WINDOW_UPDATE, 0, c.unread);
        c.unread = 0;
      }
      if (call == nullptr) return;
      if (flags & PADDED && size) {
        const uint32_t pad = std::min(uint32_t(p[0]), size - 1);
        ++p;
        size -= 1 + pad;
      }
      if (size && !call->first) call->first = now() - plan.start;
      if (plan.keep) call->data.append(reinterpret_cast<const char*>(p), size);
      if (flags & END_STREAM) settle(found->second, NO_TRAILERS);
      return;
    }
    case HEADERS:
    case CONTINUATION:
      headers(c, kind, flags, stream, p, size);
      return;
    case RST_STREAM:
      if (call != nullptr && size >= 4) settle(found->second, RESET, read32(p));
      return;
    case SETTINGS:
      if (!(flags & ACK)) settings(c, p, size);
      return;
    case PING:
      if (!(flags & ACK) && size == 8) {
        if (c.out.empty()) unflushed.push_back(&c);
        put_frame(c.out, PING, ACK, 0, p, size);
      }
      return;
    case WINDOW_UPDATE:
      if (size < 4) return;
      if (stream == 0)
        c.window += read32(p) & WINDOW;
      else if (call != nullptr)
        call->window += read32(p) & WINDOW;
      if (!c.held.empty()) send_held(c);
      return;
    case GOAWAY: {
      if (size < 8) return;
      const uint32_t last = read32(p) & WINDOW;
      c.leaving = true;
      std::vector<uint32_t> beyond;
      for (const auto& [number, of] : c.streams)
        if (number > last) beyond.push_back(of);
      for (const uint32_t of : beyond) settle(of, LOST);
      while (!c.waiting.empty()) settle(c.waiting.front(), LOST);
      return;
    }
    default:
      return;
  }
}

void Volley::headers(Connection& c, uint8_t kind, uint8_t flags, uint32_t stream, const uint8_t* p, uint32_t size) {
  if (kind == HEADERS) {
    if (flags & PADDED && size) {
      const uint32_t pad = std::min(uint32_t(p[0]), size - 1);
      ++p;
      size -= 1 + pad;
    }
    if (flags & PRIORITY && size >= 5) {
      p += 5;
      size -= 5;
    }
    c.block.clear();
    c.block_stream = stream;
    c.block_ends = flags & END_STREAM;
  }
  c.block.append(reinterpret_cast<const char*>(p), size);
  if (!(flags & END_HEADERS)) return;
  const auto found = c.streams.find(c.block_stream);
  if (found == c.streams.end()) return;
  if (!c.block_ends) {
    // 0x88 is the static table's ":status 200"; what a proxy says otherwise may be its last word.
    if (c.block.empty() || c.block[0] != '\x88') calls[found->second].head = c.block;
    return;
  }
  // A good ending needs no more words.
  const size_t at = c.block.find(GOOD, 0, GOOD_SIZE);
  const bool good = at != std::string::npos;
  settle(found->second, TRAILERS, 0, good ? GOOD : c.block.data(), good ? GOOD_SIZE : c.block.size());
}

void Volley::settings(Connection& c, const uint8_t* p, uint32_t size) {
  for (; size >= 6; p += 6, size -= 6) {
    const uint16_t name = uint16_t(p[0] << 8 | p[1]);
    const uint32_t value = read32(p + 2);
    if (name == INITIAL_WINDOW_SIZE) {
      for (const uint32_t number : c.held) calls[number].window += int64_t(value) - c.stream_window;
      c.stream_window = value;
    } else if (name == MAX_FRAME_SIZE) {
      c.frame_max = value;
    } else if (name == MAX_CONCURRENT_STREAMS) {
      c.streams_max = value;
    }
  }
  if (c.out.empty()) unflushed.push_back(&c);
  put_frame(c.out, SETTINGS, ACK, 0, "", 0);
  c.ready = true;
  send_held(c);
  next_waiting(c);
}

// ------------------------------------------------------------------------------------------------------------ the run

double Volley::work(double t) {
  for (uint32_t i = 0; i < plan.closed_count; ++i) {
    const Closed& span = plan.closed[i];
    if (!phases_begun[i].second && t >= span.begins) {
      phases_begun[i].second = true;
      for (uint32_t caller = 0; caller < span.callers; ++caller) free_callers.emplace_back(uint16_t(span.phase), int32_t(i));
    }
  }
  int begun = 0;
  std::vector<std::pair<uint16_t, int32_t>> callers;
  callers.swap(free_callers);
  for (const auto& [phase, span] : callers) {
    if (t >= plan.closed[span].ends) continue;
    begin(-1, phase, span);
    ++begun;
  }
  while (next_arrival < plan.arrival_count && plan.arrivals[next_arrival] <= t && begun < BREATH) {
    if (in_flight >= plan.in_flight_max)
      ++unsent;
    else
      begin(plan.arrivals[next_arrival], plan.phases[next_arrival], -1);
    ++next_arrival;
    ++begun;
  }
  for (uint32_t slot = 0; slot < slots.size(); ++slot)
    if (!queued[slot].empty() && t >= slots[slot].not_before) {
      std::deque<Due> again;
      again.swap(queued[slot]);
      for (const Due& waited : again)
        if (calls[waited.call].generation == waited.generation) give(waited.call, slot);
    }
  for (auto& c : connections)
    if (!c->dead && !c->ready && t > c->opened + OPEN_S) lose(*c, NO_CONNECTION);
  return sleep_until(t);
}

double Volley::sleep_until(double t) const {
  if (!free_callers.empty()) return t;
  double at = plan.ends;
  if (next_arrival < plan.arrival_count) at = std::min(at, plan.arrivals[next_arrival]);
  for (uint32_t i = 0; i < plan.closed_count; ++i)
    at = std::min(at, phases_begun[i].second ? std::max(plan.closed[i].ends, t + 0.05) : plan.closed[i].begins);
  if (!due.empty()) at = std::min(at, due.front().at);
  for (uint32_t slot = 0; slot < slots.size(); ++slot)
    if (!queued[slot].empty()) at = std::min(at, slots[slot].not_before);
  return std::min(at, t + 0.25);  // to see that it shall stop
}

bool Volley::done(double t) const {
  if (stopped.load(std::memory_order_relaxed) || t >= plan.ends) return true;
  if (in_flight || !free_callers.empty() || next_arrival < plan.arrival_count) return false;
  for (uint32_t i = 0; i < plan.closed_count; ++i)
    if (!phases_begun[i].second || t < plan.closed[i].ends) return false;
  return true;
}

void Volley::set_clock(double at) {
  if (clock_at >= 0 && at >= clock_at) return;  // it wakes us earlier, which costs less than to set it with each call
  clock_at = at;
  const double instant = plan.start + at;
  itimerspec setting{};
  setting.it_value.tv_sec = time_t(instant);
  setting.it_value.tv_nsec = std::max(1L, long((instant - double(time_t(instant))) * 1e9));
  timerfd_settime(clock, TFD_TIMER_ABSTIME, &setting, nullptr);
}

int Volley::run() {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  if (getaddrinfo(plan.host, plan.port, &hints, &address) != 0) return ENOENT;
  epoll = epoll_create1(EPOLL_CLOEXEC);
  clock = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  if (epoll < 0 || clock < 0) return errno;
  epoll_event event{EPOLLIN, {nullptr}};
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, clock, &event) != 0) return errno;
  queued.resize(slots.size());
  for (uint32_t i = 0; i < plan.closed_count; ++i) phases_begun.emplace_back(i, false);
  turn = plan.turn;
  for (uint32_t slot = 0; slot < slots.size(); ++slot) open_in(slot);
  epoll_event events[EVENTS];
  for (;;) {
    double t = now() - plan.start;
    expire(t);
    const double next = t < 0 ? 0 : work(t);
    for (size_t i = 0; i < unflushed.size(); ++i) flush(*unflushed[i]);
    unflushed.clear();
    t = now() - plan.start;
    if (t >= 0 && done(t)) break;
    int timeout = -1;
    if (next <= t || !free_callers.empty())
      timeout = 0;
    else
      set_clock(next);
    const int count = epoll_wait(epoll, events, EVENTS, timeout);
    if (count < 0 && errno != EINTR) return errno;
    for (int i = 0; i < count; ++i) {
      auto* c = static_cast<Connection*>(events[i].data.ptr);
      if (c == nullptr) {
        uint64_t ticks;
        if (read(clock, &ticks, sizeof ticks) > 0) clock_at = -1;
        continue;
      }
      if (c->dead) continue;
      if (!c->connected && events[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
          lose(*c, NO_CONNECTION);
          continue;
        }
        c->connected = true;
      }
      if (events[i].events & EPOLLOUT) flush(*c);
      if (!c->dead && events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) readable(*c);
      if (!c->dead && c->leaving && c->streams.empty()) lose(*c, LOST);
    }
    connections.erase(std::remove_if(connections.begin(), connections.end(),
                                     [this](const std::unique_ptr<Connection>& c) {
                                       if (!c->dead) return false;
                                       if (slots[c->slot].connection == c.get()) slots[c->slot].connection = nullptr;
                                       unflushed.erase(std::remove(unflushed.begin(), unflushed.end(), c.get()),
                                                       unflushed.end());
                                       return true;
                                     }),
                      connections.end());
  }
  for (uint32_t number = 0; number < calls.size(); ++number)
    if (calls[number].active) settle(number, GAVE_UP);
  return 0;
}

extern "C" {

Volley* volley_make(const Plan* plan) { return new Volley(*plan); }

// Blocks until the plan is over, or volley_stop was called by another thread; 0, or an errno.
int volley_run(Volley* volley) { return volley->run(); }

void volley_stop(Volley* volley) { volley->stopped = true; }

// The rows since the last time, and their blobs; they stay until the next time. For one thread at a time.
uint64_t volley_take(Volley* volley, const Row** rows, const char** blobs) {
  volley->take(volley->taken, volley->taken_blobs);
  *rows = volley->taken.data();
  *blobs = volley->taken_blobs.data();
  return volley->taken.size();
}

struct Progress {
  uint64_t ended, failed, unsent, kept_bytes;
};

// May be asked by another thread while the plan runs.
void volley_progress(Volley* volley, Progress* progress) {
  *progress = {volley->ended, volley->failed, volley->unsent, volley->kept_bytes};
}

void volley_free(Volley* volley) { delete volley; }
}
