"""Settings of the gateway."""

from pydantic import Field

from services.runtime.config import ServiceSettings, Settings


class Limits(Settings):
    """Bounds on what clients may ask for and hold at once."""

    #: Generation requests in progress; one more gets 429.
    max_concurrent_requests: int = Field(default=256, ge=1)
    #: REST requests in progress besides those, such as probes and uploads; one more of any kind gets 429.
    spare_http_requests: int = Field(default=1024, ge=0)
    #: Largest JSON body, bytes.
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    #: Largest training file, bytes.
    max_file_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    #: Training files read and tokenised at once; one more gets 429.
    max_concurrent_uploads: int = Field(default=2, ge=1)
    #: Most examples in a training file.
    max_file_examples: int = Field(default=1_000_000, ge=1)
    #: Event streams and watches of jobs open at once; one more gets 429.
    max_concurrent_watches: int = Field(default=64, ge=1)


class GatewaySettings(ServiceSettings):
    """Settings of one gateway process."""

    #: host:port of the gRPC API.
    listen: str = "127.0.0.1:50051"
    #: host:port of the REST API; port 0 picks a free one.
    http_listen: str = "127.0.0.1:8000"
    #: host:port of the scheduler.
    scheduler_address: str
    #: Directory with tokenizer.json, config.json and, for chat, a chat template.
    model_path: str
    #: Id clients use; empty: the directory's name.
    model_name: str = ""
    #: Most tokens of prompt plus output; 0: what config.json says.
    max_context_tokens: int = Field(default=0, ge=0)
    #: Tokens generated when a chat request names no limit; the context's rest when that is less.
    default_chat_max_tokens: int = Field(default=1024, ge=1)
    #: Seconds after which a generation is given up.
    request_timeout_s: float = Field(default=300.0, gt=0)
    #: Seconds for one call to the scheduler about files, jobs or its state.
    call_timeout_s: float = Field(default=10.0, gt=0)
    #: Seconds to store a training file at the scheduler.
    upload_timeout_s: float = Field(default=120.0, gt=0)
    #: Longest pause between two tries to reach the scheduler or a node, seconds.
    max_reconnect_backoff_s: float = Field(default=2.0, gt=0)
    limits: Limits = Limits()
