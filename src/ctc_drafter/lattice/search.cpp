// The search of `best_first.py` for one sequence, in C++: the same tree but for rounding, without Python between two
// nodes. `native.py` checks what is passed.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace {

constexpr float MAX_BIAS = 60.0f;   // as in pool.py
constexpr float MIN_PROB = 1e-30f;  // as in pool.py
constexpr int64_t ROOT = -1;

// Slot probabilities (N, C) over C = M + 2 classes: the pool's M tokens, the blank, and all others as one class.
struct Row {
    int64_t slots, size, rank;
    bool merge;
    std::vector<float> probs;
    const float* keys;      // (V, rank), or null: how the last token biases the next label
    const float* root_key;  // (rank,)
    const float* values;    // (V + 1, rank), the blank's last
    int64_t blank_value;
    const int64_t* pool;  // (M,)

    int64_t classes() const { return size + 2; }
    const float* slot(int64_t i) const { return probs.data() + i * classes(); }
};

// All one-label extensions of a prefix.
struct Extensions {
    std::vector<float> weight;  // (C,) exp of the context's bias; empty without context
    std::vector<float> other;   // (N,) mass that may emit another label than the last one at each slot
    std::vector<float> again;   // (N,) the last one again; empty unless equal neighbours merge
    std::vector<float> probs;   // (M,) prefix probability of each extension
    int64_t last;               // pool index, ROOT for the root
};

struct Candidate {
    float prob;
    int64_t label, parent, depth, of;  // `of`: whose extension it is
};

float dot(const float* a, const float* b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// (C,) weights of the classes after `last`; the class of all others has no bias.
std::vector<float> weights_after(const Row& row, int64_t last) {
    std::vector<float> weight(row.classes());
    const float* key = last == ROOT ? row.root_key : row.keys + row.pool[last] * row.rank;
    for (int64_t c = 0; c < row.size; ++c) weight[c] = dot(row.values + row.pool[c] * row.rank, key, row.rank);
    weight[row.size] = dot(row.values + row.blank_value * row.rank, key, row.rank);
    weight[row.size + 1] = 0.0f;
    for (float& w : weight) w = std::exp(std::min(std::max(w, -MAX_BIAS), MAX_BIAS));
    return weight;
}

// arrived (N + 1,): by position, the mass of the slot paths that first emit `last` there; position 0: no label yet.
Extensions extend(const Row& row, const std::vector<float>& arrived, int64_t last) {
    Extensions out;
    out.last = last;
    if (row.keys != nullptr) out.weight = weights_after(row, last);
    const bool repeats = row.merge && last != ROOT;
    out.other.resize(row.slots);
    if (repeats) out.again.resize(row.slots);
    // run: mass whose last slot emitted the last label and could merge; rest: what passed a blank or cannot merge.
    float run = 0.0f, rest = 0.0f;
    for (int64_t i = 0; i < row.slots; ++i) {
        const float* slot = row.slot(i);
        float blank = slot[row.size], normalizer = 1.0f;
        if (!out.weight.empty()) {
            normalizer = dot(slot, out.weight.data(), row.classes());
            blank *= out.weight[row.size] / normalizer;
        }
        (repeats ? run : rest) += arrived[i];
        out.other[i] = (run + rest) / normalizer;
        if (repeats) out.again[i] = rest;
        rest = (run + rest) * blank;
        run *= repeats ? slot[last] : 0.0f;
    }
    out.probs.assign(row.size, 0.0f);
    for (int64_t i = 0; i < row.slots; ++i) {
        const float* slot = row.slot(i);
        const float mass = out.other[i];
        for (int64_t c = 0; c < row.size; ++c) out.probs[c] += mass * slot[c];
    }
    if (!out.weight.empty())
        for (int64_t c = 0; c < row.size; ++c) out.probs[c] *= out.weight[c];
    if (repeats) {
        out.probs[last] = 0.0f;
        for (int64_t i = 0; i < row.slots; ++i) out.probs[last] += out.again[i] * row.slot(i)[last];
    }
    return out;
}

// `arrived` of the extension by one label.
std::vector<float> arrived_at(const Row& row, const Extensions& from, int64_t label) {
    const std::vector<float>& share = !from.again.empty() && label == from.last ? from.again : from.other;
    const float weight = from.weight.empty() ? 1.0f : from.weight[label];
    std::vector<float> out(row.slots + 1, 0.0f);
    for (int64_t i = 0; i < row.slots; ++i) out[i + 1] = share[i] * row.slot(i)[label] * weight;
    return out;
}

// The `size` tokens that are likeliest in any slot.
std::vector<int64_t> likeliest(const float* probs, int64_t slots, int64_t width, int64_t size) {
    std::vector<float> peak(probs, probs + width - 1);
    for (int64_t i = 1; i < slots; ++i)
        for (int64_t v = 0; v < width - 1; ++v) peak[v] = std::max(peak[v], probs[i * width + v]);
    std::vector<int64_t> tokens(width - 1);
    std::iota(tokens.begin(), tokens.end(), 0);
    if (size < width - 1) {
        const auto likelier = [&peak](int64_t a, int64_t b) { return peak[a] > peak[b]; };
        std::nth_element(tokens.begin(), tokens.begin() + size - 1, tokens.end(), likelier);
        tokens.resize(size);
    }
    return tokens;
}

}  // namespace

// every (N, V + 1): slot probabilities, the blank's last; keys (V, r), root_key (r,) and values (V + 1, r), or null;
// `size` tokens in the pool; ids (V,): the token of each class, or null.
// Fills nodes (3, budget) with tokens, parents and depths, and log_probs (budget,). Returns how many nodes are real, the
// others being padding; or -1 if the probabilities are not numbers.
extern "C" int64_t ctc_drafter_best_first(
    const float* every, int64_t slots, int64_t width, int64_t size, int64_t budget, int64_t levels, int64_t merge,
    const float* keys, const float* root_key, const float* values, int64_t rank, const int64_t* ids, int64_t* nodes,
    float* log_probs) {
    float all = 0.0f;
    for (int64_t i = 0; i < slots * width; ++i) all += every[i];
    if (!std::isfinite(all)) return -1;
    const std::vector<int64_t> pool = likeliest(every, slots, width, size);
    Row row{slots, size, rank, merge != 0, {}, keys, root_key, values, width - 1, pool.data()};
    row.probs.resize(slots * row.classes());
    for (int64_t i = 0; i < slots; ++i) {
        const float* from = every + i * width;
        float* to = row.probs.data() + i * row.classes();
        float sum = to[size] = from[width - 1];
        for (int64_t c = 0; c < size; ++c) sum += to[c] = from[pool[c]];
        to[size + 1] = std::max(1.0f - sum, 0.0f);
    }

    std::vector<Extensions> extensions;
    extensions.reserve(budget);
    std::vector<Candidate> candidates;  // no more than can still be taken; best last
    std::vector<float> arrived(slots + 1, 0.0f);
    arrived[0] = 1.0f;
    int64_t parent = ROOT, depth = 1, last = ROOT, taken = 0;
    while (taken < budget) {
        const size_t left = budget - taken;
        while (candidates.size() > left) candidates.erase(candidates.begin());
        if (depth <= levels) {
            extensions.push_back(extend(row, arrived, last));
            const std::vector<float>& probs = extensions.back().probs;
            const int64_t of = extensions.size() - 1;
            for (int64_t c = 0; c < size; ++c) {
                const bool full = candidates.size() == left;
                if (!(probs[c] > (full ? candidates.front().prob : MIN_PROB))) continue;
                const Candidate found{probs[c], c, parent, depth, of};
                const auto by_prob = [](const Candidate& a, const Candidate& b) { return a.prob < b.prob; };
                candidates.insert(std::upper_bound(candidates.begin(), candidates.end(), found, by_prob), found);
                if (full) candidates.erase(candidates.begin());
            }
        }
        if (candidates.empty()) break;
        const Candidate best = candidates.back();
        candidates.pop_back();
        nodes[taken] = ids == nullptr ? pool[best.label] : ids[pool[best.label]];
        nodes[budget + taken] = best.parent;
        nodes[2 * budget + taken] = best.depth;
        log_probs[taken] = std::log(best.prob);
        arrived = arrived_at(row, extensions[best.of], best.label);
        parent = taken++;
        depth = best.depth + 1;
        last = best.label;
    }
    for (int64_t node = taken; node < budget; ++node) {
        nodes[node] = 0;
        nodes[budget + node] = ROOT;
        nodes[2 * budget + node] = 1;
        log_probs[node] = -std::numeric_limits<float>::infinity();
    }
    return taken;
}
