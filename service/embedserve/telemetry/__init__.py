"""Traces, metrics and logs of the service, behind the observer protocols that the core declares.

Decides nothing the service does. Must never be imported by api, engine, model or scheduling.
"""
