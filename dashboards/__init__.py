"""Grafana dashboards, recording rules and alerts of embedserve, made from the code that defines the metrics."""
