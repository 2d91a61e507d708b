// A switch whose links have delay: it owns the switch's ends of the hosts' links, in place of a bridge.
//
//   switch PARENT MBIT MILLISECONDS PORT...
//
// Learns which address is behind which port. A frame comes to its port's queue D after it has left the sender's link,
// leaves it at the link's rate, and is dropped where 100 ms of sending wait there already. The sender's own link keeps
// its rate itself. Packets that TCP hands down as one stay one, and their checksums stay unfinished, as between any two
// ends of a veth: both are told by the header that PACKET_VNET_HDR puts before a frame. Ends when the process PARENT
// does; with 0 it stays.

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <queue>
#include <vector>

#ifndef PACKET_IGNORE_OUTGOING
#define PACKET_IGNORE_OUTGOING 23
#endif

namespace {

using Nanoseconds = std::int64_t;
using Address = std::array<unsigned char, ETH_ALEN>;
using Frame = std::shared_ptr<const std::vector<unsigned char>>;  // with the header of virtio before it

struct Header {  // virtio_net_hdr, whose own file is no C++
  std::uint8_t flags, segmentation;
  std::uint16_t length, segment, checksum_start, checksum_offset;
};

constexpr Nanoseconds kLongestQueue = 100'000'000;
constexpr std::size_t kHeader = sizeof(Header), kLargest = kHeader + ETH_HLEN + 65536;
constexpr int kBuffer = 64 << 20;  // bytes that a port's socket may hold while we are busy
constexpr unsigned char kGroup = 1;  // the bit of an address that stands for several

struct Port {
  int socket;
  Nanoseconds free;  // when its link has sent what is queued
};

struct Event {
  Nanoseconds time;
  std::uint64_t number;  // of two at the same time, the older one first
  std::size_t port;
  Frame frame;
  bool leaving;  // from the port's queue; otherwise it comes to it
  bool operator>(const Event& other) const {
    return time != other.time ? time > other.time : number > other.number;
  }
};

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

Nanoseconds now() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

int open_port(const char* name) {
  const int port = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK, 0);
  if (port < 0) fail("a socket for frames");
  const int yes = 1;
  sockaddr_ll address{};
  address.sll_family = AF_PACKET;
  address.sll_protocol = htons(ETH_P_ALL);
  address.sll_ifindex = static_cast<int>(if_nametoindex(name));
  if (address.sll_ifindex == 0) fail(name);
  if (setsockopt(port, SOL_PACKET, PACKET_VNET_HDR, &yes, sizeof yes) != 0) fail("PACKET_VNET_HDR");
  if (setsockopt(port, SOL_PACKET, PACKET_IGNORE_OUTGOING, &yes, sizeof yes) != 0) fail("PACKET_IGNORE_OUTGOING");
  setsockopt(port, SOL_SOCKET, SO_RCVBUFFORCE, &kBuffer, sizeof kBuffer);
  setsockopt(port, SOL_SOCKET, SO_SNDBUFFORCE, &kBuffer, sizeof kBuffer);
  if (bind(port, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) fail(name);
  return port;
}

Address address_at(const std::vector<unsigned char>& frame, std::size_t place) {
  Address address;
  std::memcpy(address.data(), frame.data() + kHeader + place, address.size());
  return address;
}

// What the frame takes on the wire: every packet of it has the headers.
std::int64_t bytes_on_wire(const std::vector<unsigned char>& frame) {
  Header header;
  std::memcpy(&header, frame.data(), sizeof header);
  const auto size = static_cast<std::int64_t>(frame.size() - kHeader);
  if (header.segmentation == 0 || header.segment == 0) return size;
  const std::int64_t payload = size - header.length, packets = (payload + header.segment - 1) / header.segment;
  return payload + packets * header.length;
}

class Switch {
 public:
  Switch(double mbit, double milliseconds, std::vector<Port> ports)
      : ns_a_byte_(8e3 / mbit), delay_(static_cast<Nanoseconds>(1e6 * milliseconds)), ports_(std::move(ports)) {
    for (const Port& port : ports_) polled_.push_back({port.socket, POLLIN, 0});
  }

  [[noreturn]] void run() {
    for (;;) {
      wait();
      for (std::size_t port = 0; port < ports_.size(); ++port) {
        if (polled_[port].revents != 0) receive(port);
      }
      for (Nanoseconds moment = now(); !events_.empty() && events_.top().time <= moment;) {
        const Event event = events_.top();
        events_.pop();
        event.leaving ? send(event) : enqueue(event);
      }
    }
  }

 private:
  void wait() {
    const Nanoseconds left = events_.empty() ? 1'000'000'000 : std::max<Nanoseconds>(0, events_.top().time - now());
    const timespec limit{left / 1'000'000'000, left % 1'000'000'000};
    if (ppoll(polled_.data(), polled_.size(), &limit, nullptr) < 0 && errno != EINTR) fail("ppoll");
  }

  void receive(std::size_t from) {
    for (;;) {
      const ssize_t size = recv(ports_[from].socket, buffer_.data(), buffer_.size(), 0);
      if (size < static_cast<ssize_t>(kHeader + ETH_HLEN)) return;
      const auto frame = std::make_shared<const std::vector<unsigned char>>(buffer_.begin(), buffer_.begin() + size);
      const Nanoseconds arrival = now() + delay_;
      places_[address_at(*frame, ETH_ALEN)] = from;
      const Address target = address_at(*frame, 0);
      const auto known = places_.find(target);
      if ((target[0] & kGroup) == 0 && known != places_.end()) {
        if (known->second != from) add(arrival, known->second, frame, false);
        continue;
      }
      for (std::size_t port = 0; port < ports_.size(); ++port) {
        if (port != from) add(arrival, port, frame, false);
      }
    }
  }

  void enqueue(const Event& event) {
    Nanoseconds& free = ports_[event.port].free;
    if (free - event.time > kLongestQueue) return;
    free = std::max(free, event.time) + static_cast<Nanoseconds>(ns_a_byte_ * bytes_on_wire(*event.frame));
    add(free, event.port, event.frame, true);
  }

  void send(const Event& event) {  // what the host cannot take is lost, as on any link
    (void)::send(ports_[event.port].socket, event.frame->data(), event.frame->size(), MSG_DONTWAIT);
  }

  void add(Nanoseconds time, std::size_t port, Frame frame, bool leaving) {
    events_.push({time, count_++, port, std::move(frame), leaving});
  }

  const double ns_a_byte_;
  const Nanoseconds delay_;
  std::vector<Port> ports_;
  std::vector<pollfd> polled_;
  std::vector<unsigned char> buffer_ = std::vector<unsigned char>(kLargest);
  std::map<Address, std::size_t> places_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::uint64_t count_ = 0;
};

// A switch is no program of the machine that others may keep waiting; without the right to that, it does without.
void come_first() {
  const sched_param most{2};
  sched_setscheduler(0, SCHED_RR, &most);
  prctl(PR_SET_TIMERSLACK, 1UL);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::fprintf(stderr, "usage: switch PARENT MBIT MILLISECONDS PORT...\n");
    return 2;
  }
  if (const int parent = std::atoi(arguments[1]); parent != 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) return 1;
  }
  come_first();
  std::vector<Port> ports;
  for (int place = 4; place < count; ++place) ports.push_back({open_port(arguments[place]), 0});
  std::puts("ready");
  std::fflush(stdout);
  Switch(std::atof(arguments[2]), std::atof(arguments[3]), std::move(ports)).run();
}
