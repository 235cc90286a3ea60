#include "artifacts.h"

#include <algorithm>
#include <set>
#include <sstream>
#include <tuple>

// `artifacts.inc` is a list of STCA_ATTEND and STCA_COMBINE lines. It is read twice: here for the bytes of each PTX file
// (the assembler includes them), below for the tables that point at them.
#define STCA_EMBED(id, file)                                                                                            \
    asm(".section .rodata\n"                                                                                            \
        ".global stca_ptx_" #id "\n"                                                                                    \
        ".hidden stca_ptx_" #id "\n"                                                                                    \
        "stca_ptx_" #id ":\n"                                                                                           \
        ".incbin \"" file "\"\n"                                                                                        \
        ".byte 0\n"                                                                                                     \
        ".previous\n");                                                                                                 \
    extern "C" char const stca_ptx_##id[];
#define STCA_ATTEND(id, file, ...) STCA_EMBED(id, file)
#define STCA_COMBINE(id, file, ...) STCA_EMBED(id, file)
#include "artifacts.inc"
#undef STCA_ATTEND
#undef STCA_COMBINE

namespace stca
{

std::vector<Attend> const& attends()
{
#define STCA_ATTEND(id, file, element, heads, keyHeads, depth, valueDepth, segments, ...)                               \
    Attend{Shape{Element::element, heads, keyHeads, depth, valueDepth, segments}, __VA_ARGS__, stca_ptx_##id},
#define STCA_COMBINE(...)
    static std::vector<Attend> const table{
#include "artifacts.inc"
    };
#undef STCA_ATTEND
#undef STCA_COMBINE
    return table;
}

std::vector<Combine> const& combines()
{
#define STCA_ATTEND(...)
#define STCA_COMBINE(id, file, element, ...) Combine{Element::element, __VA_ARGS__, stca_ptx_##id},
    static std::vector<Combine> const table{
#include "artifacts.inc"
    };
#undef STCA_ATTEND
#undef STCA_COMBINE
    return table;
}

bool operator==(Shape const& a, Shape const& b)
{
    return std::tie(a.element, a.heads, a.keyHeads, a.depth, a.valueDepth, a.segments)
        == std::tie(b.element, b.heads, b.keyHeads, b.depth, b.valueDepth, b.segments);
}

int64_t Attend::gridX(int64_t targets, int64_t requests) const
{
    return targets * (shape.heads / shape.keyHeads) / blockM + requests;
}

int64_t Attend::busyX(int64_t targets, int64_t requests) const
{
    int64_t const rows = targets * (shape.heads / shape.keyHeads) / requests;
    return requests * std::max<int64_t>((rows + blockM - 1) / blockM, 1);
}

int32_t Attend::gridY() const
{
    return shape.keyHeads * ((shape.valueDepth + blockDv - 1) / blockDv);
}

int32_t artifactSm(int32_t sm)
{
    constexpr int32_t kPORTABLE = 80;
    bool const own = std::any_of(attends().begin(), attends().end(), [sm](Attend const& a) { return a.sm == sm; });
    return own ? sm : sm >= kPORTABLE ? kPORTABLE : -1;
}

std::string supported()
{
    static char const* const kNAMES[] = {"bfloat16", "float16", "float32"};
    std::set<std::string> shapes;
    std::set<int32_t> sms;
    for (Attend const& a : attends())
    {
        std::ostringstream one;
        one << kNAMES[static_cast<int32_t>(a.shape.element)] << " H=" << a.shape.heads << " H_k=" << a.shape.keyHeads
            << " D=" << a.shape.depth << " D_v=" << a.shape.valueDepth << " scale=" << a.scale << (a.shape.segments ? " segments" : "");
        shapes.insert(one.str());
        sms.insert(a.sm);
    }
    std::ostringstream all;
    all << "supported are";
    for (std::string const& shape : shapes)
    {
        all << " [" << shape << "]";
    }
    all << ", int32 offsets, SM";
    for (int32_t sm : sms)
    {
        all << " " << sm;
    }
    return all.str();
}

} // namespace stca
