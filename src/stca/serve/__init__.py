"""A server for bundles that speaks the Open Inference Protocol, version 2, over HTTP and gRPC (extra `serve`)."""
