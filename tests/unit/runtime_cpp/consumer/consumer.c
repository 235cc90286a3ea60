/* The header is C, and the library can be used without C++: reads a bundle and prints what it takes. */
#include <stdio.h>
#include <stca/runtime.h>

int main(int argc, char** argv) {
  stca_bundle* bundle = NULL;
  size_t i;
  if (argc != 2) return 2;
  if (stca_bundle_load(argv[1], &bundle) != STCA_OK) {
    fprintf(stderr, "%s\n", stca_last_error());
    return 1;
  }
  printf("abi %u, weights %s\n", (unsigned)stca_library_abi_version(), stca_bundle_weights(bundle));
  for (i = 0; i < stca_bundle_input_count(bundle, "request"); ++i) {
    stca_tensor_spec spec;
    if (stca_bundle_input(bundle, "request", i, &spec) != STCA_OK) return 1;
    printf("%s\n", spec.name);
  }
  stca_bundle_release(bundle);
  return 0;
}
