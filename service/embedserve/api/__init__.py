"""The gRPC front: translation only. The engine behind it knows no transport, and nothing here knows a tensor."""
