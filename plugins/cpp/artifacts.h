// The kernels this library was built with: PTX written by `python -m stca.plugins.artifacts`, embedded byte for byte.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace stca
{

//! Element type of query, key and value. `attend` with parts and `combine` write and read float32 in between.
enum class Element : int32_t
{
    kBFLOAT16,
    kFLOAT16,
    kFLOAT32
};

//! What is fixed when a kernel is compiled. `keyHeads` is 1 (absorbed) or `heads` (projected).
struct Shape
{
    Element element;
    int32_t heads;
    int32_t keyHeads;
    int32_t depth;
    int32_t valueDepth;
    bool segments; //!< a request reads a list of them
};

bool operator==(Shape const& a, Shape const& b);

//! `attend_kernel`, compiled. `tied`: key and value are one tensor. `parts`: writes partial results to be combined.
struct Attend
{
    Shape shape;
    float scale;
    bool tied;
    bool parts;
    int32_t sm;
    int32_t blockM;
    int32_t blockN;
    int32_t blockDv;
    int32_t warps;
    int32_t stages;
    int32_t shared;    //!< dynamic shared memory, bytes
    int32_t leastRows; //!< serves launches with at least this many rows per request and key head
    char const* ptx;

    //! Blocks of a launch: y covers key heads and tiles of the value, x the rows. Of the x blocks about `busyX` find rows
    //! to work on, if the requests are of equal size; the others end at once.
    int64_t gridX(int64_t targets, int64_t requests) const;
    int64_t busyX(int64_t targets, int64_t requests) const;
    int32_t gridY() const;
};

//! `combine_kernel`, compiled.
struct Combine
{
    Element element;
    int32_t valueDepth;
    int32_t sm;
    int32_t warps;
    int32_t shared;
    char const* ptx;
};

std::vector<Attend> const& attends();
std::vector<Combine> const& combines();

//! The SM whose artifacts a GPU of this compute capability loads: its own, or the portable SM 80; -1 when it is older.
int32_t artifactSm(int32_t sm);

//! One line that names the shapes, types and SMs this library was built for.
std::string supported();

} // namespace stca
