// Vector clocks: which actor's past does a thread know, by the synchronisation it took part in?
//
// Actors are the block's threads and stand-ins for what runs beside them (TMA writes of one mbarrier, wgmma reads of
// one warpgroup). A thread's epoch grows when it releases its past to others; an access carries its actor's epoch, and
// is ordered before what another thread does now exactly when that thread knows the epoch. What a thread knows of
// others is immutable and shared: after a barrier all threads hold the same pointer, so a barrier costs one vector, not
// one a thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace simt {

using Epoch = uint32_t;
using Knowledge = std::shared_ptr<const std::vector<Epoch>>;  // by actor; null = nothing

inline Epoch known_epoch(const Knowledge& knowledge, int actor) { return knowledge ? (*knowledge)[actor] : 0; }

struct ThreadClock {
  int actor = 0;
  Epoch epoch = 1;
  Knowledge others;
  // The same as of the last fence.proxy.async on the way here: what the async proxy is sure to see.
  Epoch fenced_epoch = 0;
  Knowledge fenced_others;

  bool knows(int other, Epoch when) const { return when <= (other == actor ? epoch : known_epoch(others, other)); }
  bool async_proxy_knows(int other, Epoch when) const {
    return when <= (other == actor ? fenced_epoch : known_epoch(fenced_others, other));
  }
};

// Fresh in the whole block, so threads that synchronised together get one epoch and the shadow can merge their reads.
Epoch next_epoch();
void reset_epochs(int num_actors);

// What several threads know together.
class ClockJoin {
 public:
  void add(const ThreadClock& clock);
  void add(const ClockJoin& other);
  void set(int actor, Epoch epoch);
  void clear();
  // Replaces what the thread knows of others. The thread itself must have been added.
  void publish_to(ThreadClock& clock);
  // Adds to what the thread knows.
  void merge_into(ThreadClock& clock);

 private:
  struct Side {
    std::vector<Epoch> sum;
    Knowledge last_added;  // threads that share their knowledge are added once; alive, so its address is its own
    Knowledge published;
    Knowledge merge_input, merge_result;  // the last merge: a warp's lanes ask for the same one
    void add(const Knowledge& others, int actor, Epoch epoch);
    const Knowledge& publish();
    void add(const Side& other);
    void merge_into(Knowledge& others);
  };
  Side known_, fenced_;
};

}  // namespace simt
