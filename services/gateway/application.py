"""The application layer, put together: what REST and gRPC both call."""

import asyncio
import uuid
from contextlib import suppress
from dataclasses import dataclass

import grpc.aio

from lemix.v1 import cluster_service_pb2
from services.gateway.cluster import ClusterView
from services.gateway.config import GatewaySettings
from services.gateway.generation import GenerationService
from services.gateway.prompts import PromptBuilder
from services.gateway.scheduler_link import SchedulerLink
from services.gateway.token_streams import TokenStreams
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.training import TrainingService
from services.gateway.training_examples import ExampleBuilder
from services.runtime.clock import Clock


@dataclass(frozen=True, slots=True)
class Application:
    """Everything a front door needs, and the links behind it."""

    generation: GenerationService
    training: TrainingService
    cluster: ClusterView
    link: SchedulerLink
    streams: TokenStreams

    async def run_links(self) -> None:
        """Keep the session with the scheduler, and with it the streams to nodes, until cancelled."""
        try:
            await self.link.run()
        finally:
            with suppress(asyncio.CancelledError):
                await self.streams.close()


def build(
    settings: GatewaySettings, tokenizer: ModelTokenizer, model_name: str, scheduler: grpc.aio.Channel, clock: Clock
) -> Application:
    """Wire one gateway. Call inside the event loop."""
    gateway_id = f"gateway-{uuid.uuid4().hex[:12]}"
    limits = settings.limits
    backoff_s = settings.max_reconnect_backoff_s
    streams = TokenStreams(gateway_id, max_backoff_s=backoff_s)
    link = SchedulerLink(
        scheduler, gateway_id, streams, max_requests=limits.max_concurrent_requests, max_backoff_s=backoff_s
    )
    prompts = PromptBuilder(tokenizer, model_name, settings.default_chat_max_tokens)
    model = cluster_service_pb2.Model(
        id=model_name, max_context_tokens=tokenizer.max_context_tokens, created_unix_s=clock.unix_s()
    )
    return Application(
        generation=GenerationService(
            tokenizer,
            prompts,
            link,
            clock,
            gateway_id=gateway_id,
            request_timeout_s=settings.request_timeout_s,
            max_concurrent_requests=limits.max_concurrent_requests,
        ),
        training=TrainingService(
            scheduler,
            prompts,
            ExampleBuilder(tokenizer),
            clock,
            limits,
            call_timeout_s=settings.call_timeout_s,
            upload_timeout_s=settings.upload_timeout_s,
        ),
        cluster=ClusterView(scheduler, link, model, call_timeout_s=settings.call_timeout_s),
        link=link,
        streams=streams,
    )
