"""Profile artifacts as they are written and read: JSON of the message, with a hash of its content."""

from pathlib import Path

from google.protobuf import json_format

from lemix.internal.v1 import profile_pb2
from services.latency.artifact import document_hash
from services.profile_document import ArtifactError, NotAProfile, check_content, in_file, read_document, read_text

__all__ = ["ArtifactError", "content_hash", "load_artifact", "read_artifact", "write_artifact"]


def content_hash(profile: profile_pb2.Profile) -> str:
    """What `Profile.content_hash` of this profile has to be."""
    return document_hash(json_format.MessageToDict(profile, preserving_proto_field_name=True))


def write_artifact(profile: profile_pb2.Profile) -> str:
    """The JSON text of a profile, its hash set to that of its content."""
    stored = profile_pb2.Profile()
    stored.CopyFrom(profile)
    stored.content_hash = content_hash(profile)
    return json_format.MessageToJson(stored, preserving_proto_field_name=True)


def load_artifact(path: Path) -> profile_pb2.Profile:
    """The profile in a file. Raises ArtifactError, whose message names the file."""
    text = read_text(path)
    try:
        return read_artifact(text)
    except ArtifactError as error:
        raise in_file(path, error) from error


def read_artifact(text: str) -> profile_pb2.Profile:
    """The profile in a JSON text. Raises ArtifactError; also without a hash, or with one that is not the content's."""
    document = read_document(text)
    try:
        profile = json_format.ParseDict(document, profile_pb2.Profile())
    except json_format.ParseError as error:
        # The lines after the first list every field that there is.
        raise NotAProfile(str(error).splitlines()[0].rstrip(".")) from error
    check_content(json_format.MessageToDict(profile, preserving_proto_field_name=True))
    return profile
