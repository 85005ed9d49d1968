// The Python face of the native step. Arrays cross by DLPack and are kept alive by what uses them; nothing is copied but codes
// that are laid into panels. The interpreter's lock is released while a step runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "model.h"
#include "sample.h"

namespace nb = nanobind;
using namespace nb::literals;

#ifndef SPRAT_MODULE
#error "name the module"
#endif

namespace {

using namespace sprat;

using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Int32s = nb::ndarray<const std::int32_t, nb::c_contig, nb::device::cpu>;
using Int64s = nb::ndarray<const std::int64_t, nb::c_contig, nb::device::cpu>;
using OutFloats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using OutInt64s = nb::ndarray<std::int64_t, nb::c_contig, nb::device::cpu>;
using OutInt16s = nb::ndarray<std::int16_t, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<std::uint8_t, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const char* what) { throw nb::value_error(what); }

// A matrix together with the arrays that it points into.
struct Weights {
    Matrix matrix;
    std::vector<AnyArray> arrays;
    std::vector<Floats> bias;
    std::vector<Floats> low_rank;  // what the adapters point into
    std::vector<LowRank> adapters;

    Weights(int kind, Index rows, Index cols, Index group, AnyArray data, nb::object scales, nb::object minimums, nb::object bias_of) {
        if (kind < 0 || kind > 5 || rows < 1 || cols < 1 || group < kGroup || group % kGroup) refuse("a matrix of no known shape");
        matrix.kind = static_cast<WeightType>(kind), matrix.rows = rows, matrix.cols = cols, matrix.group = group;
        const auto take = [&](const AnyArray& array, Index bytes) {
            if (static_cast<Index>(array.nbytes()) != bytes) refuse("an array has another size than its matrix");
            arrays.push_back(array);
            return array.data();
        };
        const Index scale_bytes = matrix.scale_bytes();
        matrix.data = static_cast<const std::uint8_t*>(take(data, matrix.bytes()));
        if (matrix.quantized()) matrix.scales = static_cast<const std::uint16_t*>(take(nb::cast<AnyArray>(scales), scale_bytes));
        if (matrix.kind == WeightType::int4_min) matrix.minimums = static_cast<const std::uint16_t*>(take(nb::cast<AnyArray>(minimums), scale_bytes));
        if (!bias_of.is_none()) {
            bias.push_back(nb::cast<Floats>(bias_of));
            if (static_cast<Index>(bias[0].size()) != rows) refuse("a bias has another size than its matrix");
            matrix.bias = bias[0].data();
        }
    }

    // What each adapter adds, in order: (A [rank, cols], the transpose of B [rank, rows up to a multiple of 16]), or None. Before
    // a decoder is given the matrix.
    void set_adapters(const nb::list& pairs) {
        adapters.clear();
        for (nb::handle pair : pairs) {
            LowRank adapter;
            if (!pair.is_none()) {
                const auto both = nb::cast<nb::tuple>(pair);
                const auto a = nb::cast<Floats>(both[0]), b = nb::cast<Floats>(both[1]);
                adapter.stride = matrix.panels() * kLanes, adapter.a = a.data(), adapter.b = b.data();
                if (a.ndim() != 2 || b.ndim() != 2 || a.shape(0) < 1 || a.shape(0) != b.shape(0) || static_cast<Index>(a.shape(1)) != matrix.cols || static_cast<Index>(b.shape(1)) != adapter.stride) refuse("an adapter of another shape than its matrix");
                adapter.rank = static_cast<Index>(a.shape(0));
                low_rank.push_back(a), low_rank.push_back(b);
            }
            adapters.push_back(adapter);
        }
        matrix.adapters = adapters.data();
    }
};

// Eight codes of four bits, two neighbors a byte, to four bytes: the first four in the low nibbles, the others in the high.
std::uint32_t interleave_nibbles(std::uint32_t word) {
    const std::uint32_t even = word & 0x0f0f0f0fu, odd = word >> 4 & 0x0f0f0f0fu;
    const std::uint32_t a = (even & 0xffffu) | even >> 16 << 4, b = (odd & 0xffffu) | odd >> 16 << 4;
    return (a & 0xffu) | (b & 0xffu) << 8 | (a & 0xff00u) << 8 | (b & 0xff00u) << 16;
}

// Row-major codes [rows, cols] to panels. Four bits: two columns a byte, the even one low; `flip` is what turns a stored
// code into an unsigned one (8 for two's complement, 0 for codes of 0 … 15). Eight bits: flip 128.
void pack_codes(AnyArray from, OutBytes to, Index rows, Index cols, int bits, int flip) {
    const Index padded = (cols + kGroup - 1) / kGroup * kGroup, stride = bits == 4 ? (cols + 1) / 2 : cols;
    const Index panels = (rows + kLanes - 1) / kLanes, panel_bytes = padded * kLanes * bits / 8;
    if (static_cast<Index>(from.nbytes()) != rows * stride || static_cast<Index>(to.nbytes()) != panels * panel_bytes) refuse("codes of another shape");
    const auto* in = static_cast<const std::uint8_t*>(from.data());
    std::uint8_t* out = to.data();
    const auto zero_code = static_cast<std::uint8_t>(bits == 4 ? flip * 17 : flip);
    std::memset(out, zero_code, to.nbytes());
    for (Index r = 0; r < rows; ++r) {
        std::uint8_t* panel_at = out + r / kLanes * panel_bytes + r % kLanes * 4;
        const std::uint8_t* row = in + r * stride;
        const Index at_once = bits == 4 ? 8 : 4, whole = cols / at_once * at_once;
        for (Index c = 0; c < whole; c += at_once) {
            std::uint32_t word;
            std::memcpy(&word, row + c * bits / 8, 4);
            word = bits == 4 ? interleave_nibbles(word) ^ static_cast<std::uint32_t>(flip) * 0x11111111u : word ^ static_cast<std::uint32_t>(flip) * 0x01010101u;
            std::memcpy(panel_at + c / at_once * 64, &word, 4);
        }
        for (Index c = whole; c < cols; ++c) {
            if (bits == 8) {
                panel_at[c / 4 * 64 + c % 4] = static_cast<std::uint8_t>(row[c] ^ flip);
                continue;
            }
            const int code = ((c % 2 ? row[c / 2] >> 4 : row[c / 2]) & 15) ^ flip;
            std::uint8_t& byte = panel_at[c / 8 * 64 + c % 4];
            byte = static_cast<std::uint8_t>(c % 8 < 4 ? (byte & 0xf0) | code : (byte & 0x0f) | (code << 4));
        }
    }
}

// Float16 scales [rows, groups] to [panels, groups, 16]; zero beyond the last row.
void pack_scales(AnyArray from, OutBytes to, Index rows, Index groups) {
    const Index panels = (rows + kLanes - 1) / kLanes;
    if (static_cast<Index>(from.nbytes()) != rows * groups * 2 || static_cast<Index>(to.nbytes()) != panels * groups * kLanes * 2) refuse("scales of another shape");
    const auto* in = static_cast<const std::uint16_t*>(from.data());
    auto* out = reinterpret_cast<std::uint16_t*>(to.data());
    std::memset(out, 0, to.nbytes());
    for (Index r = 0; r < rows; ++r) {
        for (Index g = 0; g < groups; ++g) out[(r / kLanes * groups + g) * kLanes + r % kLanes] = in[r * groups + g];
    }
}

// out [rows, outputs] = rows [rows, inputs] times the transpose of the weights: one kernel by itself.
void product(const Weights& w, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> rows, OutFloats out, int threads) {
    const Index count = static_cast<Index>(rows.shape(0)), width = static_cast<Index>(rows.shape(1));
    if (width != w.matrix.cols || static_cast<Index>(out.size()) != count * w.matrix.rows || threads < 1 || count < 1) refuse("a product of odd shape");
    ThreadPool pool(threads);
    QuantizedRowsScratch scratch;
    const Input in{rows.data(), width, count, nullptr, scratch.need(count * w.matrix.padded() / kGroup, w.matrix.padded()), {}};
    const Tiling tiling(count, kTile);
    for (Index t = 0; t < tiling.tiles; ++t) {
        const Index start = tiling.start(t);
        quantize_tile([&](Index r) { return rows.data() + (start + r) * width; }, width, in.codes, start, tiling.size(t));
    }
    multiply(pool, in, {{&w.matrix, out.data(), w.matrix.rows, false}});
}

template <class T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// One token for each row of logits, its greatest logit, and the logarithm of its sum; whether all rows were finite. See
// sample.h.
bool sample(nb::ndarray<const float, nb::ndim<2>, nb::device::cpu> logits, Index vocab, Column<float> temperature, Column<Index> top_k,
          Column<float> top_p, Column<float> min_p, Column<double> noise, nb::ndarray<Index, nb::c_contig, nb::device::cpu> tokens,
          nb::ndarray<float, nb::c_contig, nb::device::cpu> tops, nb::ndarray<float, nb::c_contig, nb::device::cpu> sums) {
    const std::size_t rows = logits.shape(0);
    const Index width = static_cast<Index>(logits.shape(1));
    if (logits.stride(1) != 1 || vocab < 1 || vocab > width) refuse("logits of odd shape");
    for (const std::size_t size : {temperature.size(), top_k.size(), top_p.size(), min_p.size(), noise.size(), tokens.size(), tops.size(), sums.size()}) {
        if (size != rows) refuse("settings for another number of rows");
    }
    nb::gil_scoped_release free;
    Sampler sampler;
    bool all_finite = true;
    for (std::size_t r = 0; r < rows; ++r) {
        const SamplingParams params{temperature.data()[r], top_p.data()[r], min_p.data()[r], top_k.data()[r], noise.data()[r]};
        const Sampled sampled = sampler.sample(logits.data() + static_cast<Index>(r) * logits.stride(0), vocab, width, params);
        tokens.data()[r] = sampled.token;
        tops.data()[r] = sampled.top;
        sums.data()[r] = sampled.sum;
        all_finite = all_finite && sampled.token >= 0;
    }
    return all_finite;
}

template <class T>
T get(const nb::dict& table, const char* name) {
    return nb::cast<T>(table[name]);
}

class Decoder {
public:
    Decoder(const nb::dict& d, int threads, int kv_format) : model_(dims(d), threads, static_cast<KVFormat>(kv_format)) {
        if (kv_format < 0 || kv_format > 2 || (kv_format == 2 && !model_.dims_.supports_i8())) refuse("heads that the int8 KV cache does not take");
        if (threads < 1 || threads > 1024) refuse("threads must lie between 1 and 1024");
    }

    void set_embedding_and_head(const nb::dict& d) {
        model_.embedding = matrix(d, "embedding");
        model_.head = matrix(d, "head");
        model_.norm_last = gain(d, "norm", model_.dims_.hidden);
        set_freqs_cis(get<Floats>(d, "freqs_cis"));
    }

    void set_freqs_cis(Floats freqs_cis) {
        const Index wide = model_.dims_.rotary();
        if (freqs_cis.size() % wide) refuse("freqs_cis of another width");
        freqs_cis_ = {freqs_cis};
        model_.freqs_cis = freqs_cis.data();
        model_.num_positions = static_cast<Index>(freqs_cis.size()) / wide;
    }

    void add_layer(const nb::dict& d) { model_.layers.push_back(layer(d)); }

    void add_mtp_module(const nb::dict& d) {
        MtpModule mtp_module;
        const Index wide = model_.dims_.hidden;
        mtp_module.norm_embedding = gain(d, "norm_embedding", wide), mtp_module.norm_hidden = gain(d, "norm_hidden", wide);
        mtp_module.norm_last = gain(d, "norm_last", wide);
        mtp_module.eh_proj = matrix(d, "eh_proj");
        mtp_module.layer = layer(d);
        model_.mtp_modules.push_back(mtp_module);
    }

    Index block_bytes() const { return model_.block_bytes(); }
    Index blocks() const { return blocks_; }
    int active_threads() { return model_.pool().active_threads(); }

    void reserve(Index blocks) {
        if (blocks <= blocks_) return;
        model_.reserve(blocks);
        blocks_ = blocks;
    }

    void run(Int32s tokens, Int32s positions, Int32s starts, Int32s tables, Int32s wanted, Int32s adapters, OutFloats logits) {
        const Batch b = batch(tokens, positions, starts, tables, wanted, adapters);
        check_logits(b, logits);
        std::int16_t* routes = take_routes(b);
        nb::gil_scoped_release free;
        model_.run(b, {logits.data(), nullptr, 0}, routes);
    }

    // Where the next run writes the experts of each of its tokens: [T, MoE layers, top_k]. Given anew for each run, so that
    // those that nobody asks pay nothing.
    void record_routes(OutInt16s routes) { routes_ = {routes}, routes_asked_ = true; }

    // `run`, of which only the likeliest token of each row is wanted.
    void run_argmax(Int32s tokens, Int32s positions, Int32s starts, Int32s tables, Int32s wanted, Int32s adapters, Index vocab, OutInt64s argmax) {
        const Batch b = batch(tokens, positions, starts, tables, wanted, adapters);
        if (static_cast<Index>(argmax.size()) != b.num_logits || vocab < 1 || vocab > model_.dims_.vocab) refuse("tokens of another number of rows");
        std::int16_t* routes = take_routes(b);
        nb::gil_scoped_release free;
        model_.run(b, {nullptr, argmax.data(), vocab}, routes);
    }

    // Of the tokens of the last `run`.
    void logits(Int32s wanted, OutFloats out) {
        check_wanted(wanted, out, model_.dims_.vocab);
        nb::gil_scoped_release free;
        model_.logits(wanted.data(), static_cast<Index>(wanted.size()), out.data());
    }
    void hidden(Int32s wanted, OutFloats out) {
        check_wanted(wanted, out, model_.dims_.hidden);
        nb::gil_scoped_release free;
        model_.hidden(wanted.data(), static_cast<Index>(wanted.size()), out.data());
    }

    void draft(Int32s tokens, Int32s positions, Int32s starts, Int32s tables, Int32s wanted, Int32s adapters, Int64s next, Index vocab, OutInt64s guesses) {
        const Index before = last_count_;
        const Batch b = batch(tokens, positions, starts, tables, wanted, adapters);
        if (b.num_tokens != before || static_cast<Index>(next.size()) != b.num_tokens) refuse("drafts follow a step of the same rows");
        if (static_cast<Index>(guesses.size()) != b.num_seqs * static_cast<Index>(model_.mtp_modules.size())) refuse("guesses of another shape");
        if (vocab < 1 || vocab > model_.dims_.vocab) refuse("more tokens than there are");
        for (Index t = 0; t < b.num_tokens; ++t) if (next.data()[t] >= model_.dims_.vocab) refuse("a token beyond the vocabulary");
        nb::gil_scoped_release free;
        model_.draft(b, next.data(), vocab, guesses.data());
    }

    void copy(Index source, Index target) {
        check_block(source), check_block(target);
        std::memcpy(model_.block(target), model_.block(source), static_cast<std::size_t>(model_.block_bytes()));
    }
    nb::bytes read(Index at) const {
        check_block(at);
        return nb::bytes(reinterpret_cast<const char*>(model_.block(at)), static_cast<std::size_t>(model_.block_bytes()));
    }
    void write(Index at, nb::bytes data) {
        check_block(at);
        if (static_cast<Index>(data.size()) != model_.block_bytes()) refuse("a block has another size");
        std::memcpy(model_.block(at), data.c_str(), data.size());
    }

private:
    static Dims dims(const nb::dict& d) {
        Dims out;
        out.is_mla = get<bool>(d, "is_mla"), out.interleave = get<bool>(d, "interleave");
        out.hidden = get<Index>(d, "hidden"), out.vocab = get<Index>(d, "vocab"), out.heads = get<Index>(d, "heads");
        out.kv_heads = get<Index>(d, "kv_heads"), out.head_dim = get<Index>(d, "head_dim"), out.rank = get<Index>(d, "rank");
        out.nope = get<Index>(d, "nope"), out.rope = get<Index>(d, "rope"), out.value = get<Index>(d, "value");
        out.adapters = get<Index>(d, "adapters"), out.adapter_rank = get<Index>(d, "adapter_rank");
        out.scale = get<float>(d, "scale"), out.eps = get<float>(d, "eps");
        return out;
    }

    Matrix matrix(const nb::dict& d, const char* name) {
        if (!d.contains(name)) return {};
        const nb::object weights = nb::borrow<nb::object>(d[name]);
        owned_.push_back(weights);
        return checked(nb::cast<const Weights&>(weights));
    }

    const Matrix& checked(const Weights& weights) const {
        if (!weights.adapters.empty() && static_cast<Index>(weights.adapters.size()) != model_.dims_.adapters) refuse("a matrix with another number of adapters");
        for (const LowRank& adapter : weights.adapters) if (adapter.rank > model_.dims_.adapter_rank) refuse("an adapter of a higher rank");
        return weights.matrix;
    }

    const float* gain(const nb::dict& d, const char* name, Index size) {
        if (!d.contains(name)) return nullptr;
        gains_.push_back(get<Floats>(d, name));
        if (static_cast<Index>(gains_.back().size()) != size) refuse("a norm of another width");
        return gains_.back().data();
    }

    Layer layer(const nb::dict& d) {
        const Dims& s = model_.dims_;
        Layer out;
        out.norm_in = gain(d, "norm_in", s.hidden), out.norm_out = gain(d, "norm_out", s.hidden);
        out.q_norm = gain(d, "q_norm", s.head_dim), out.k_norm = gain(d, "k_norm", s.head_dim);
        out.latent_norm = gain(d, "latent_norm", s.rank);
        out.q = matrix(d, "q"), out.q_down = matrix(d, "q_down"), out.k = matrix(d, "k"), out.v = matrix(d, "v");
        out.q_latent_norm = gain(d, "q_latent_norm", out.q_down.rows);
        out.kv_down = matrix(d, "kv_down"), out.kv_up = matrix(d, "kv_up"), out.o = matrix(d, "o");
        out.router = matrix(d, "router");
        if (out.router.rows) {
            Routing& r = out.routing;
            r.experts = out.router.rows, r.top_k = get<Index>(d, "top_k"), r.groups = get<Index>(d, "groups");
            r.topk_groups = get<Index>(d, "topk_groups"), r.sigmoid = get<bool>(d, "sigmoid"), r.sum_top2 = get<bool>(d, "sum_top2");
            r.normalize = get<bool>(d, "normalize"), r.scale = get<float>(d, "routed_scale");
            out.router_bias = gain(d, "router_bias", r.experts);
        }
        for (nb::handle one : get<nb::list>(d, "experts")) {
            const auto parts = nb::cast<nb::tuple>(one);
            for (std::size_t i = 0; i < 3; ++i) owned_.push_back(nb::borrow<nb::object>(parts[i]));
            out.experts.push_back({checked(nb::cast<const Weights&>(parts[0])), checked(nb::cast<const Weights&>(parts[1])),
                                   checked(nb::cast<const Weights&>(parts[2]))});
        }
        out.shared = get<bool>(d, "shared");
        if (d.contains("window")) out.window = get<Index>(d, "window");
        if (out.window < 0 || (out.window && s.is_mla)) refuse("a window of no keys, or of latents");
        if (out.experts.size() != static_cast<std::size_t>(std::max<Index>(out.router.rows, 1) + (out.shared ? 1 : 0))) refuse("experts are missing");
        return out;
    }

    void check_block(Index at) const {
        if (at < 0 || at >= blocks_) refuse("no such block");
    }

    // What `record_routes` gave for this run; none where nobody asks.
    std::int16_t* take_routes(const Batch& b) {
        if (!routes_asked_) return nullptr;
        routes_asked_ = false;
        if (static_cast<Index>(routes_[0].size()) != b.num_tokens * model_.experts_per_token()) refuse("routes of another shape");
        return routes_[0].data();
    }

    void check_logits(const Batch& b, const OutFloats& logits) const {
        if (static_cast<Index>(logits.size()) != b.num_logits * model_.dims_.vocab) refuse("logits of another shape");
    }

    void check_wanted(const Int32s& wanted, const OutFloats& out, Index wide) const {
        for (std::size_t r = 0; r < wanted.size(); ++r) if (wanted.data()[r] < 0 || wanted.data()[r] >= last_count_) refuse("a wanted token that is not there");
        if (static_cast<Index>(out.size()) != static_cast<Index>(wanted.size()) * wide) refuse("rows of another shape");
    }

    // Everything that would let a step read or write where it must not is looked at here.
    Batch batch(const Int32s& tokens, const Int32s& positions, const Int32s& starts, const Int32s& tables, const Int32s& wanted, const Int32s& adapters) {
        const Batch b{tokens.data(), positions.data(), starts.data(), tables.data(), wanted.data(), static_cast<Index>(tokens.size()),
                      static_cast<Index>(starts.size()) - 1, static_cast<Index>(tables.ndim() == 2 ? tables.shape(1) : 0),
                      static_cast<Index>(wanted.size()), adapters.size() ? adapters.data() : nullptr};
        if (b.num_seqs < 1 || static_cast<Index>(positions.size()) != b.num_tokens || static_cast<Index>(tables.size()) != b.num_seqs * b.blocks_per_seq) refuse("a batch of odd shape");
        if (b.cu_seqlens[0] != 0 || b.cu_seqlens[b.num_seqs] != b.num_tokens) refuse("starts do not span the tokens");
        for (Index s = 0; s < b.num_seqs; ++s) {
            if (b.cu_seqlens[s + 1] <= b.cu_seqlens[s]) refuse("a sequence without tokens");
            const Index first = b.positions[b.cu_seqlens[s]], last = b.positions[b.cu_seqlens[s + 1] - 1];
            if (first < 0 || last - first != b.cu_seqlens[s + 1] - b.cu_seqlens[s] - 1 || last >= model_.num_positions || last / kBlock >= b.blocks_per_seq) refuse("positions out of order or beyond the context");
            for (Index w = 0; w <= last / kBlock; ++w) check_block(b.block_tables[s * b.blocks_per_seq + w]);
        }
        for (Index t = 0; t < b.num_tokens; ++t) {
            if (b.tokens[t] < 0 || b.tokens[t] >= model_.dims_.vocab) refuse("a token beyond the vocabulary");
        }
        for (Index s = 0; s < b.num_seqs; ++s) {
            for (Index t = b.cu_seqlens[s] + 1; t < b.cu_seqlens[s + 1]; ++t) if (b.positions[t] != b.positions[t - 1] + 1) refuse("positions out of order");
        }
        for (Index r = 0; r < b.num_logits; ++r) if (b.logits_indices[r] < 0 || b.logits_indices[r] >= b.num_tokens) refuse("a wanted token that is not there");
        if (b.adapters && static_cast<Index>(adapters.size()) != b.num_seqs) refuse("adapters of another number of sequences");
        for (Index s = 0; b.adapters && s < b.num_seqs; ++s) if (b.adapters[s] < -1 || b.adapters[s] >= model_.dims_.adapters) refuse("no such adapter");
        last_count_ = b.num_tokens;
        return b;
    }

    Model model_;
    Index blocks_ = 0, last_count_ = 0;
    std::vector<nb::object> owned_;
    std::vector<Floats> gains_, freqs_cis_;
    std::vector<OutInt16s> routes_;
    bool routes_asked_ = false;
};

}  // namespace

NB_MODULE(SPRAT_MODULE, m) {
    nb::set_leak_warnings(false);
    m.attr("isa") = kIsa;
    m.attr("block") = kBlock;
    nb::class_<Weights>(m, "Weights")
        .def(nb::init<int, Index, Index, Index, AnyArray, nb::object, nb::object, nb::object>(), "kind"_a, "rows"_a, "cols"_a, "group"_a,
             "data"_a, "scales"_a = nb::none(), "minimums"_a = nb::none(), "bias"_a = nb::none())
        .def("set_adapters", &Weights::set_adapters);
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<const nb::dict&, int, int>(), "dims"_a, "threads"_a, "kv_format"_a)
        .def("set_embedding_and_head", &Decoder::set_embedding_and_head)
        .def("set_freqs_cis", &Decoder::set_freqs_cis)
        .def("add_layer", &Decoder::add_layer)
        .def("add_mtp_module", &Decoder::add_mtp_module)
        .def("reserve", &Decoder::reserve)
        .def("run", &Decoder::run)
        .def("run_argmax", &Decoder::run_argmax)
        .def("logits", &Decoder::logits)
        .def("hidden", &Decoder::hidden)
        .def("record_routes", &Decoder::record_routes)
        .def("draft", &Decoder::draft)
        .def("copy", &Decoder::copy)
        .def("read", &Decoder::read)
        .def("write", &Decoder::write)
        .def_prop_ro("block_bytes", &Decoder::block_bytes)
        .def_prop_ro("active_threads", &Decoder::active_threads)
        .def_prop_ro("blocks", &Decoder::blocks);
    m.def("product", &product, "weights"_a, "rows"_a, "out"_a, "threads"_a);
    m.def("pack_codes", &pack_codes);
    m.def("pack_scales", &pack_scales);
    m.def("sample", &sample, "logits"_a, "vocab"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "noise"_a, "tokens"_a, "tops"_a, "sums"_a);
}
