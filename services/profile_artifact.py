"""Profile artifacts as they are written and read: JSON of the message, with a hash of its content."""

from google.protobuf import json_format

from lemix.internal.v1 import profile_pb2
from services.latency.artifact import document_hash


class ArtifactError(ValueError):
    """Not a profile, or one that was changed after it was written; the message is one line."""


def content_hash(profile: profile_pb2.Profile) -> str:
    """What `Profile.content_hash` of this profile has to be."""
    return document_hash(json_format.MessageToDict(profile, preserving_proto_field_name=True))


def write_artifact(profile: profile_pb2.Profile) -> str:
    """The JSON text of a profile, its hash set to that of its content."""
    stored = profile_pb2.Profile()
    stored.CopyFrom(profile)
    stored.content_hash = content_hash(profile)
    return json_format.MessageToJson(stored, preserving_proto_field_name=True)


def read_artifact(text: str) -> profile_pb2.Profile:
    """The profile in a JSON text. Raises ArtifactError; also for a hash that is not that of the content."""
    try:
        profile = json_format.Parse(text, profile_pb2.Profile())
    except json_format.ParseError as error:
        raise ArtifactError(" ".join(str(error).split())) from error
    if not profile.fits:
        raise ArtifactError("holds no latency model")
    if profile.content_hash and profile.content_hash != content_hash(profile):
        raise ArtifactError(
            f"the content does not match content_hash {profile.content_hash[:12]}: it was changed after it was measured"
        )
    return profile
