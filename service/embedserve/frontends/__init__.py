"""Engine processes, one a device, and front-end processes behind one port.

A call costs an event loop half a millisecond, most of it inside gRPC, so one process ends at some 1,500 calls a second
whatever its device can do. With ``server.frontends`` of 2 or more, so many processes each have an event loop, a gRPC
server and tokenizer threads; one more owns the scheduler and the device, and judges all calls together. With
``model.devices`` of several there is one of those for each device, and a front end chooses which takes a call.
"""
