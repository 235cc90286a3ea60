/* stca runtime, C ABI: load a bundle, score requests, keep user states between requests.
 *
 * The words and the rules are those of the Python package `stca.runtime`; docs/cpp_runtime.md is the guide.
 *
 * Every function that can fail returns a code of `stca_code`, STCA_OK being 0, and leaves a one-line message for
 * stca_last_error(). No exception leaves any function. What a caller passes in stays the caller's: it is read during the call and not kept. What is
 * given out as a handle is released by the function named beside it. Sessions and bundles may be used from many
 * threads at once; a handle must not be released while another thread uses it. In a child of fork(), a session of the
 * parent answers STCA_FORKED_ERROR, and releasing it does nothing.
 */
#ifndef STCA_RUNTIME_H
#define STCA_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define STCA_API __attribute__((visibility("default")))
#else
#define STCA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a change would break programs compiled against an older header: the N of libstca_runtime.so.N. */
#define STCA_ABI_VERSION 1
#define STCA_MAX_RANK 8

/* The error kinds of `stca.errors`. Codes never change their meaning; those from 100 on exist in this library only. */
typedef enum stca_code {
  STCA_OK = 0,
  STCA_ERROR = 1,            /* StcaError */
  STCA_CHECKPOINT_ERROR = 2, /* CheckpointError */
  STCA_EXPORT_ERROR = 3,     /* ExportError */
  STCA_SPLIT_ERROR = 4,      /* SplitError */
  STCA_BUILD_ERROR = 5,      /* BuildError: an engine cannot be made or loaded */
  STCA_BUNDLE_ERROR = 6,     /* BundleError: the bundle is missing, damaged, too new, or not a bundle */
  STCA_PARITY_ERROR = 7,     /* ParityError */
  STCA_REQUEST_ERROR = 8,    /* RequestError: the request was refused; nothing was computed or kept */
  STCA_ENGINE_ERROR = 9,     /* EngineError: an engine failed on inputs that passed the door; they may be right */
  STCA_HISTORY_NEEDED = 10, /* HistoryNeededError, a RequestError: no state of this version is kept; send the history */
  STCA_DEADLINE_ERROR = 11,  /* DeadlineError: the time that the answer was wanted for is over */
  STCA_CANCELLED_ERROR = 12, /* CancelledError: the caller no longer wants the answer */
  STCA_USAGE_ERROR = 100,   /* this library was called wrongly: a null pointer, an index too large */
  STCA_INTERNAL_ERROR = 101, /* the host is out of memory, or a defect of this library */
  STCA_FORKED_ERROR = 102    /* the session was loaded before this process was forked from another: load one here */
} stca_code;

/* Element types. Manifests use the first ten and, of states, the last; a request may also bring the unsigned ones. */
typedef enum stca_dtype {
  STCA_BOOL = 0,
  STCA_INT8 = 1,
  STCA_UINT8 = 2,
  STCA_INT16 = 3,
  STCA_INT32 = 4,
  STCA_INT64 = 5,
  STCA_FLOAT16 = 6,
  STCA_BFLOAT16 = 7,
  STCA_FLOAT32 = 8,
  STCA_FLOAT64 = 9,
  STCA_UINT16 = 10,
  STCA_UINT32 = 11,
  STCA_UINT64 = 12,
  STCA_FLOAT8_E4M3 = 13 /* of states alone: no function takes or gives it */
} stca_dtype;

typedef enum stca_scope { STCA_NO_SCOPE = 0, STCA_USER = 1, STCA_REQUEST = 2, STCA_TARGET = 4 } stca_scope;

/* A dense row-major array that someone else owns, aligned to its element size. */
typedef struct stca_tensor {
  const char* name;
  const void* data; /* may be NULL when there are no elements */
  int32_t dtype;    /* stca_dtype */
  int32_t rank;     /* 0 … STCA_MAX_RANK */
  int64_t shape[STCA_MAX_RANK];
} stca_tensor;

/* One user and the targets to score for them; the inputs are this user's alone, without offsets. */
typedef struct stca_request {
  const stca_tensor* inputs;
  size_t input_count;
  const char* user;    /* whose state may be kept and reused, as text: 12 is "12"; NULL keeps nothing */
  const char* version; /* which history this is: change it when the history changes; NULL takes a digest of the user
                          inputs. With a version, a user whose state is kept need not send the user inputs again. */
} stca_request;

/* Several requests as flat rows with offsets, no padding: `history_offsets`, `target_offsets` are among the inputs. */
typedef struct stca_request_batch {
  const stca_tensor* inputs;
  size_t input_count;
  const char* const* users; /* one for each request, NULL entries keep nothing; may be NULL with user_count 0 */
  size_t user_count;
  const char* const* versions;
  size_t version_count;
} stca_request_batch;

/* The calling thread's last error, one line: what is wrong and what to do. Valid until the thread's next error. */
STCA_API const char* stca_last_error(void);
/* "RequestError" for STCA_REQUEST_ERROR and so on; "unknown" for no code of ours. */
STCA_API const char* stca_code_name(int32_t code);
/* What a program decides by, the same words as the `code` of Python's errors: "history_needed", "bad_request",
 * "bad_bundle", "build", "engine", "usage", "deadline", "cancelled", "forked", "internal"; "ok" for STCA_OK, "other" for the rest. */
STCA_API const char* stca_code_kind(int32_t code);
/* Bytes of one element; 0 for no dtype of ours. */
STCA_API size_t stca_dtype_bytes(int32_t dtype);
STCA_API const char* stca_library_version(void);
STCA_API uint32_t stca_library_abi_version(void);

/* ---- bundles ---------------------------------------------------------------------------------------------------- */

typedef struct stca_bundle stca_bundle;

/* What the manifest says of one input or output of a graph. Strings live as long as the bundle. */
typedef struct stca_tensor_spec {
  const char* name;
  int32_t dtype;
  int32_t scope; /* stca_scope; STCA_NO_SCOPE for outputs and for states */
  int64_t limit; /* ids are in [0, limit); 0 when any value will do */
  int32_t rank;
  int64_t shape[STCA_MAX_RANK];      /* -1 where symbolic */
  const char* symbol[STCA_MAX_RANK]; /* "N_h", "N_t", "B", "B_plus_1" or the model's own; NULL where fixed */
} stca_tensor_spec;

/* Reads the manifest and holds every file against it. Release with stca_bundle_release. */
STCA_API int32_t stca_bundle_load(const char* path, stca_bundle** bundle);
STCA_API void stca_bundle_release(stca_bundle* bundle);
/* As it was given; in `make_engine`, a path to the folder that was checked, whatever is put in its place. */
STCA_API const char* stca_bundle_path(const stca_bundle* bundle);
STCA_API const char* stca_bundle_weights(const stca_bundle* bundle);  /* the weights' version, a SHA-256 */
STCA_API const char* stca_bundle_manifest(const stca_bundle* bundle); /* the text of manifest.json */
/* `graph` is "request", "user_encoder" or "target_scorer". The path leads to the file that was checked, also after
 * another bundle was put in this one's place, and lives as long as the handle; NULL: no such graph. */
STCA_API const char* stca_bundle_file(const stca_bundle* bundle, const char* graph);
STCA_API size_t stca_bundle_input_count(const stca_bundle* bundle, const char* graph);
STCA_API size_t stca_bundle_output_count(const stca_bundle* bundle, const char* graph);
STCA_API int32_t stca_bundle_input(const stca_bundle* bundle, const char* graph, size_t index, stca_tensor_spec* spec);
STCA_API int32_t stca_bundle_output(const stca_bundle* bundle, const char* graph, size_t index, stca_tensor_spec* spec);

/* ---- engines of the caller's own -------------------------------------------------------------------------------- */

typedef struct stca_outputs stca_outputs;

/* Something that executes one graph. `run` may be called from several threads at once. */
typedef struct stca_engine {
  void* self;
  /* Receives exactly the graph's inputs in the manifest's order, valid during the call. For each of the graph's outputs
   * it calls stca_outputs_allocate once and writes there. Returns STCA_OK, or a code, best through stca_fail. */
  int32_t (*run)(void* self, const stca_tensor* inputs, size_t input_count, stca_outputs* outputs);
  void (*release)(void* self); /* may be NULL */
  const char* name;            /* copied when the engine is handed over */
} stca_engine;

/* Memory for output `index` in the manifest's order, of the dtype the manifest names. NULL, and the run has failed with
 * the reason recorded, when the manifest has no such output or another shape. */
STCA_API void* stca_outputs_allocate(stca_outputs* outputs, size_t index, int32_t rank, const int64_t* shape);
/* For callbacks: keeps `message` for whoever called the session, and returns `code`. */
STCA_API int32_t stca_fail(int32_t code, const char* message);

/* Makes the engine of one graph of a bundle being loaded: fills `engine` and returns STCA_OK, or returns a code, and
 * the load fails with it. `bundle` lives as long as the engine, and is not the caller's to release. */
typedef int32_t (*stca_make_engine)(void* context, const stca_bundle* bundle, const char* graph, stca_engine* engine);

/* ---- sessions --------------------------------------------------------------------------------------------------- */

typedef struct stca_session stca_session;
typedef struct stca_scores stca_scores;

/* A caller's own source of the rows of a table that left the graphs, a parameter server say. `rows` writes the rows of
 * `count` ids, one after the other, each of the table's width, and returns STCA_OK or a code, best through stca_fail. Ids
 * are numbers of rows of the table. It may be called from several threads at once. */
typedef struct stca_table_source {
  const char* table; /* its name in the manifest; copied */
  int32_t (*rows)(void* context, const int64_t* ids, size_t count, float* rows);
  void* context; /* must outlive the session */
} stca_table_source;

typedef struct stca_options {
  size_t size;          /* sizeof(stca_options) where the caller was compiled; set by stca_options_init */
  uint64_t cache_bytes; /* most memory for user states between requests, all that an entry takes; 0 keeps none */
  int32_t truncate;     /* not 0: serve a history longer than the limit from its most recent part */
  int32_t threads;      /* of one request, where the engine uses CPU threads; 0 takes every processor that this process
                         * may use. A server with several callers at once does best with processors / callers */
  const char* engine;   /* "tensorrt", "onnxruntime" or "graphs" (one and the same: the bundle's own graphs on the CPU),
                         * or NULL for the fastest that runs here; stca_session_engine_choice says which and why */
  stca_make_engine make_engine; /* the caller's own instead; NULL for the built-in ones */
  void* make_engine_context;    /* must outlive the session: swap makes engines again */
  int32_t cuda_graphs; /* most CUDA graphs that each TensorRT engine keeps, one for each shape; from 0 down, none */
  int32_t unchecked_scores; /* not 0: hand out scores as they are; else NaN and infinities are an EngineError */
  uint64_t max_users;       /* most users whose states are kept; 0 for no limit but cache_bytes */
  double ttl_seconds;       /* longest time that a state is kept after it was encoded or appended to; 0 for no limit */
  const char* precision;    /* of the built engines that `engine` names: "fp32", "bf16" or "fp16"; NULL: the fastest */
  uint64_t max_targets;     /* most targets of a request, or of a batch together */
  int32_t check_versions;   /* not 0: for debugging, refuse a history that is sent with the version of another one that
                             * is kept; otherwise a history sent on a hit is not looked at */
  const stca_table_source* tables; /* where rows of tables come from; the bundle's files for those that are not named */
  size_t table_count;
  const char* state_folder; /* of files in which states outlive memory and the process, for engines on a CPU; it is this
                             * session's own until that is released. NULL or "" keeps states in memory alone */
  uint64_t state_folder_bytes; /* most bytes of files in it */
  int32_t native_code; /* not 0: open plans that carry native code, as those with our plugin do: you trust their maker.
                        * Others are passed over, and refused where `engine` asks for them */
} stca_options;

typedef struct stca_cache_stats {
  uint64_t hits;   /* requests of a user and version whose state was at hand, or was being encoded by another call */
  uint64_t misses; /* encodings of a user's whole history that such requests caused */
  uint64_t evictions;
  uint64_t refused; /* states larger than the whole budget */
  uint64_t users;   /* whose states are kept */
  uint64_t bytes;   /* the memory that takes, names and objects included; never more than `budget` */
  uint64_t budget;
  uint64_t expired;     /* states that became older than ttl_seconds */
  uint64_t state_bytes; /* of `bytes`, the states' own tensors */
  uint64_t warmed;      /* states made ahead of a request, by stca_session_warm */
  uint64_t appends;     /* histories that grew, or were corrected, without being encoded again */
  /* Of `hits`, where the state was: kept in memory, or made for another call at that moment. */
  uint64_t hits_memory, hits_joined;
  /* Of `misses`, why there was no state, as far as it is known: never seen, one of another version is kept, it became
   * too old, it went for want of room, a swap to other weights dropped it, it was larger than the whole budget. */
  uint64_t misses_new_user, misses_version, misses_expired, misses_evicted, misses_weights, misses_too_large;
  /* With a state_folder: of `hits`, those whose state was in a file; of `misses`, those whose record was torn or changed. */
  uint64_t hits_file, misses_damaged;
  /* What the folder holds, and did: users, bytes of their files; states that were read, written, went for want of room,
   * became too old; were skipped, because they left memory before they were written or were too large; records that were
   * torn, changed, or of other weights; those that could not be written; and states that wait to be written. */
  uint64_t file_users, file_bytes, file_budget, file_reads, file_writes, file_written_bytes, file_evictions;
  uint64_t file_expired, file_skipped, file_discarded, file_failed, file_waiting;
  double file_read_seconds; /* what all reads took together */
  uint64_t room_bytes;      /* the memory that `state_bytes` lie in, with the room that appends left for rows to come */
  uint64_t appended_bytes;  /* what `appends` wrote: inputs that wait, new rows, those that moved into a larger room, what
                             * follows from sums once it is computed, and all rows of a corrected history */
} stca_cache_stats;

/* Defaults: 1 GiB of states, 64 CUDA graphs, 1048576 targets, everything else off. `size` is the caller's
 * sizeof(stca_options): a library that knows more fields leaves alone what lies behind the caller's. stca_options_init
 * passes it along; the function of that name is for programs that were compiled before the struct grew. */
STCA_API void stca_options_init_sized(stca_options* options, size_t size);
#define stca_options_init(options) stca_options_init_sized((options), sizeof(stca_options))

/* Release with stca_session_release. `options` may be NULL. */
STCA_API int32_t stca_session_load(const char* bundle, const stca_options* options, stca_session** session);
STCA_API void stca_session_release(stca_session* session);

/* Scores of `count` requests' targets, one request after the other, computed together. A user whose state is kept is
 * not encoded again; nothing runs for a request without targets. Release with stca_scores_release. */
STCA_API int32_t stca_session_score(stca_session* session, const stca_request* requests, size_t count,
                                    stca_scores** scores);
STCA_API int32_t stca_session_score_batch(stca_session* session, const stca_request_batch* batch, stca_scores** scores);

/* Seconds from now in which an answer is of use, and a way to say earlier that it no longer is. It is looked at before
 * work begins and between its stages, never within an engine's run: then a call ends with STCA_DEADLINE_ERROR or
 * STCA_CANCELLED_ERROR, and a state that was made is kept. Make it when the request arrives, so that waiting in a queue
 * counts; 0 or less is over already, and with INFINITY it can be cancelled alone. Several calls may share one. Any
 * thread may cancel; release it with stca_deadline_release when no call has it. */
typedef struct stca_deadline stca_deadline;
STCA_API int32_t stca_deadline_make(double seconds, stca_deadline** deadline);
STCA_API int32_t stca_deadline_cancel(stca_deadline* deadline);
STCA_API void stca_deadline_release(stca_deadline* deadline);
/* The same calls with a deadline; NULL is for ever. */
STCA_API int32_t stca_session_score_by(stca_session* session, const stca_request* requests, size_t count,
                                       const stca_deadline* deadline, stca_scores** scores);
STCA_API int32_t stca_session_score_batch_by(stca_session* session, const stca_request_batch* batch,
                                             const stca_deadline* deadline, stca_scores** scores);
STCA_API const float* stca_scores_values(const stca_scores* scores); /* targets × tasks, row-major */
STCA_API size_t stca_scores_targets(const stca_scores* scores);
STCA_API size_t stca_scores_tasks(const stca_scores* scores);
/* The model's own type, float64 say, and the scores in it: stca_scores_values are float32 made of them. */
STCA_API int32_t stca_scores_dtype(const stca_scores* scores);
STCA_API const void* stca_scores_data(const stca_scores* scores);
/* Of the requests with targets, how many found their user's state at hand. */
STCA_API size_t stca_scores_hits(const stca_scores* scores);
STCA_API void stca_scores_release(stca_scores* scores);

/* Adds new events, oldest first, to a kept state; only they are encoded. `version` is that of the history with them; a
 * call with the version that is kept already changes nothing. `after` is that of the history they follow: nothing is
 * added to another one, so no event lost on the way goes unnoticed; NULL adds to whichever is kept.
 * `kept` says whether the longer state is kept: not when there was none to add to, it went or changed meanwhile, or the
 * new one is over the budget. Then the next request brings the history. Where states are sums over events, these may wait
 * for the next request, a hit that takes longer then. */
STCA_API int32_t stca_session_append(stca_session* session, const char* user, const stca_tensor* events,
                                     size_t event_count, const char* version, const char* after, int32_t* kept);
/* Puts corrected events in the place of kept ones, as when a label arrives late; exact, as an append, and with its
 * arguments. `at` is the place of the first in the kept history: 0 is the oldest event, -1 the newest. All of them must
 * be within it, or it is a STCA_REQUEST_ERROR. */
STCA_API int32_t stca_session_amend(stca_session* session, const char* user, const stca_tensor* events,
                                    size_t event_count, const char* version, int64_t at, const char* after,
                                    int32_t* kept);
/* Makes and keeps a user's state ahead of the request that needs it, while targets are being recalled, say: in this
 * thread, once a processor is free of scores. A request of the same version that comes meanwhile joins the encoding.
 * `history` are the user inputs, which may be left out where the version may be kept already; `version` may be NULL, as
 * in a request. STCA_DEADLINE_ERROR when its turn does not come within `seconds` from now; INFINITY waits as long as it
 * takes. `kept` says whether the state is kept. */
STCA_API int32_t stca_session_warm(stca_session* session, const char* user, const stca_tensor* history,
                                   size_t history_count, const char* version, double seconds, int32_t* kept);
STCA_API int32_t stca_session_warm_by(stca_session* session, const char* user, const stca_tensor* history,
                                      size_t history_count, const char* version, const stca_deadline* deadline,
                                      int32_t* kept);
/* Drops what is kept of a user, and of an encoding under way when it is done; `kept` says whether anything was kept. */
STCA_API int32_t stca_session_forget(stca_session* session, const char* user, int32_t* kept);
/* Where a user's state is kept, for a router; it counts as no use. */
typedef enum stca_tier { STCA_NOWHERE = 0, STCA_IN_MEMORY = 1, STCA_IN_FILE = 2 } stca_tier;
typedef struct stca_residence {
  int32_t tier;          /* stca_tier; STCA_NOWHERE where a request would be a miss */
  int32_t known;         /* not 0: the version of its history is known; of a file only the one that was asked for is */
  uint64_t bytes;        /* what it takes there */
  size_t version_length; /* of the whole version */
} stca_residence;
/* `version`: only of this history; NULL for whichever is kept. The version of what is found is copied into `text` and cut
 * to `size` bytes with the final NUL. */
STCA_API int32_t stca_session_residence(const stca_session* session, const char* user, const char* version,
                                        stca_residence* found, char* text, size_t size);
/* Serves another bundle from the next request on; running ones finish on the old. On failure nothing changes. */
STCA_API int32_t stca_session_swap(stca_session* session, const char* bundle);

/* `size` is the caller's sizeof(stca_cache_stats), as with stca_options_init. */
STCA_API int32_t stca_session_stats_sized(const stca_session* session, stca_cache_stats* stats, size_t size);
#define stca_session_stats(session, stats) stca_session_stats_sized((session), (stats), sizeof(stca_cache_stats))
/* The bundle being served, as a handle of its own: release with stca_bundle_release. */
STCA_API int32_t stca_session_bundle(const stca_session* session, stca_bundle** bundle);
/* Which engine runs `graph`, copied into `name` and cut to `size` bytes with the final NUL. */
STCA_API int32_t stca_session_engine(const stca_session* session, const char* graph, char* name, size_t size);
/* Of the engines' choice, "why" those, or which faster ones were "passed_over", with the reason of each; empty when
 * none was. Copied into `text` and cut to `size` bytes with the final NUL; `length`, unless it is NULL, is that of the
 * whole. */
STCA_API int32_t stca_session_engine_choice(const stca_session* session, const char* what, char* text, size_t size,
                                            size_t* length);

#ifdef __cplusplus
}
#endif
#endif
