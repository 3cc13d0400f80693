#include "clock.h"

#include <algorithm>

namespace simt {

namespace {

Epoch latest_epoch = 1;
int actor_count = 0;

void raise_to(std::vector<Epoch>& sum, const std::vector<Epoch>& other) {
  std::transform(sum.begin(), sum.end(), other.begin(), sum.begin(), [](Epoch a, Epoch b) { return std::max(a, b); });
}

}  // namespace

Epoch next_epoch() { return ++latest_epoch; }

void reset_epochs(int num_actors) {
  latest_epoch = 1;
  actor_count = num_actors;
}

void ClockJoin::Side::add(const Knowledge& others, int actor, Epoch epoch) {
  if (sum.empty()) sum.assign(static_cast<size_t>(actor_count), 0);
  if (others && others != last_added) {
    raise_to(sum, *others);
    last_added = others;
  }
  sum[actor] = std::max(sum[actor], epoch);
  published = nullptr;
}

void ClockJoin::Side::add(const Side& other) {
  if (other.sum.empty()) return;
  if (sum.empty()) sum.assign(static_cast<size_t>(actor_count), 0);
  raise_to(sum, other.sum);
  published = nullptr;
}

const Knowledge& ClockJoin::Side::publish() {
  if (!published) {
    published = std::make_shared<const std::vector<Epoch>>(sum);
    merge_result = nullptr;
  }
  return published;
}

void ClockJoin::Side::merge_into(Knowledge& others) {
  if (sum.empty()) return;
  publish();
  if (!merge_result || merge_input != others) {
    merge_input = others;
    auto merged = std::make_shared<std::vector<Epoch>>(*published);
    if (others) raise_to(*merged, *others);
    merge_result = std::move(merged);
  }
  others = merge_result;
}

void ClockJoin::add(const ThreadClock& clock) {
  known_.add(clock.others, clock.actor, clock.epoch);
  fenced_.add(clock.fenced_others, clock.actor, clock.fenced_epoch);
}

void ClockJoin::add(const ClockJoin& other) {
  known_.add(other.known_);
  fenced_.add(other.fenced_);
}

void ClockJoin::set(int actor, Epoch epoch) {
  known_.add(nullptr, actor, epoch);
  fenced_.add(nullptr, actor, epoch);
}

void ClockJoin::clear() { *this = ClockJoin(); }

void ClockJoin::publish_to(ThreadClock& clock) {
  clock.others = known_.publish();
  clock.fenced_others = fenced_.publish();
}

void ClockJoin::merge_into(ThreadClock& clock) {
  known_.merge_into(clock.others);
  fenced_.merge_into(clock.fenced_others);
}

}  // namespace simt
