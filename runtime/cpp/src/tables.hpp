// Embedding tables beside the graphs: rows in a mapped file, or of the caller's own source, and engines that look them up.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "engine.hpp"

namespace stca::core {

/// Holds a table's files against the manifest: their sizes and, where the table is small enough, every block. Throws
/// BundleError.
void check_table(const Folder& folder, const TableSpec& table);

/// Where the rows of each of a bundle's tables come from: `own`, else the bundle's files. Throws UsageError when the bundle
/// has no table of a name in `own`.
std::map<std::string, std::shared_ptr<RowSource>> row_sources(
    const Bundle& bundle, const std::map<std::string, std::shared_ptr<RowSource>>& own);

/// `engine`, of a graph's file, as the manifest tells of the graph: with the look-ups of rows before it. `ids` computes
/// ids; null where all are inputs.
std::unique_ptr<Engine> with_tables(const std::shared_ptr<const Bundle>& bundle, const std::string& graph,
                                    std::unique_ptr<Engine> engine, std::unique_ptr<Engine> ids,
                                    const std::map<std::string, std::shared_ptr<RowSource>>& sources);

}  // namespace stca::core
