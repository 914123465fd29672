"""What the gateway counts."""

from prometheus_client import Counter, Gauge, Histogram

_LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

HTTP_REQUESTS = Counter("lemix_gateway_http_requests_total", "Finished REST requests", ["route", "status"])
HTTP_IN_FLIGHT = Gauge("lemix_gateway_http_in_flight", "REST requests in progress")
GENERATIONS = Counter("lemix_gateway_generations_total", "Ended generations", ["result"])
GENERATIONS_IN_FLIGHT = Gauge("lemix_gateway_generations_in_flight", "Generations in progress")
TTFT_S = Histogram("lemix_gateway_ttft_seconds", "Arrival to first token", buckets=_LATENCIES_S)
TPOT_S = Histogram("lemix_gateway_tpot_seconds", "Mean time per output token after the first", buckets=_LATENCIES_S)
PROMPT_TOKENS = Counter("lemix_gateway_prompt_tokens_total", "Prompt tokens of accepted requests")
OUTPUT_TOKENS = Counter("lemix_gateway_output_tokens_total", "Tokens delivered")
TRAINING_EXAMPLES = Counter("lemix_gateway_training_examples_total", "Examples handed over", ["source"])
