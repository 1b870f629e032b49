# Read by the build of llama-cpp-python for the tests (Makefile): of llama.cpp they need the library alone.
set(LLAMA_BUILD_COMMON OFF)
