"""Prefill and decode on different instances: the KV cache moves between them (DistServe, Splitwise)."""
