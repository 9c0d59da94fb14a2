"""Random calls of the C++ operators: a short run in the ordinary suite, a long one under sanitizers (``make sanitize``)."""
