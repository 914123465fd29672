"""The scheduler core: pure decisions about accepted work. `step(now_s, event) -> commands`.

Vocabulary: II idleness increased, R response time, IP idleness profit, LC length consistency (paper sections 4-5);
A-PP asynchronous pipeline parallelism: the next micro-batch of a node's stream is released when one before it is over.
"""
