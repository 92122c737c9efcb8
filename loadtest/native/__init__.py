"""The load generator in C++: ``client.cpp`` sends a plan, ``volley`` builds it and calls it."""
