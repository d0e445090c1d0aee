"""Where programs run: platforms, tracing, native code, sharding, the cache folder."""
