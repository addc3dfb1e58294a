"""Clients nobody here wrote."""

import json
import subprocess
from typing import Any

import grpc
import httpx
import openai
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from prometheus_client.parser import text_string_to_metric_families

QUESTION = [{"role": "user", "content": "What is the capital of France? One short sentence."}]


def _client(platform: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{platform.url}/v1", api_key="none", max_retries=0)


def test_openai_chat_answers_a_question(two_replicas: Any) -> None:
    """The openai client gets the right answer, whole and streamed alike."""
    with _client(two_replicas) as client:
        whole = client.chat.completions.create(
            model="chat", messages=QUESTION, temperature=0, max_tokens=32
        )
        stream = client.chat.completions.create(
            model="chat",
            messages=QUESTION,
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = whole.choices[0].message.content
    assert text is not None and "Paris" in text
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == "stop"


def test_openai_logprobs_add_up(two_replicas: Any) -> None:
    """Greedy tokens are the likeliest of their top_logprobs, and their bytes join to the text."""
    with _client(two_replicas) as client:
        answer = client.chat.completions.create(
            model="chat",
            messages=QUESTION,
            temperature=0,
            max_tokens=8,
            logprobs=True,
            top_logprobs=3,
        )
    choice = answer.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
    joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert joined.decode().startswith((choice.message.content or "")[:5])


def test_openai_completions(two_replicas: Any) -> None:
    """Several prompts, n, stop, echo and token ids through the completions API."""
    with _client(two_replicas) as client:
        two = client.completions.create(
            model="chat", prompt=["1, 2, 3,", "A, B, C,"], max_tokens=6, temperature=0
        )
        assert [choice.index for choice in two.choices] == [0, 1]
        several = client.completions.create(
            model="chat", prompt="Once upon a time", n=3, max_tokens=8, seed=7, temperature=1.0
        )
        assert len({choice.text for choice in several.choices}) > 1
        again = client.completions.create(
            model="chat", prompt="Once upon a time", n=3, max_tokens=8, seed=7, temperature=1.0
        )
        assert [c.text for c in again.choices] == [c.text for c in several.choices]
        stopped = client.completions.create(
            model="chat", prompt="1, 2, 3,", max_tokens=32, temperature=0, stop=[" 7"]
        )
        assert stopped.choices[0].finish_reason == "stop"
        assert "6" in stopped.choices[0].text and "7" not in stopped.choices[0].text
        echoed = client.completions.create(
            model="chat", prompt="1, 2, 3,", max_tokens=2, temperature=0, echo=True, logprobs=1
        )
        assert echoed.choices[0].text.startswith("1, 2, 3,")
        ids = httpx.post(
            f"{two_replicas.url}/tokenize", json={"model": "chat", "prompt": "1, 2, 3,"}
        ).json()["tokens"]
        by_ids = client.completions.create(model="chat", prompt=ids, max_tokens=6, temperature=0)
        assert by_ids.choices[0].text == two.choices[0].text


def test_openai_lists_models_and_names_an_unknown_one(two_replicas: Any) -> None:
    """/v1/models has the service; another id is the client's NotFoundError."""
    with _client(two_replicas) as client:
        assert [model.id for model in client.models.list()] == ["chat"]
        try:
            client.completions.create(model="nope", prompt="x")
        except openai.NotFoundError as error:
            assert "nope" in error.message and error.code == "model_not_found"
        else:
            raise AssertionError("an unknown model was served")


def test_curl_streams(two_replicas: Any) -> None:
    """curl -N reads server-sent events that end with [DONE]."""
    body = json.dumps({"model": "chat", "messages": QUESTION, "max_tokens": 4, "stream": True})
    done = subprocess.run(
        [
            *("curl", "-sN", "-H", "content-type: application/json", "-d", body),
            f"{two_replicas.url}/v1/chat/completions",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    events = [line for line in done.stdout.split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["id"] for event in events[:-1])


def test_grpc_reflection_is_enough_to_call_the_router(two_replicas: Any) -> None:
    """As grpcurl does: types by reflection, then Router.Chat without our stubs."""
    with grpc.insecure_channel(f"127.0.0.1:{two_replicas.grpc_port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "shoal.v1.Router" in database.get_services()
        method = (
            DescriptorPool(database).FindServiceByName("shoal.v1.Router").methods_by_name["Chat"]
        )
        request = GetMessageClass(method.input_type)(
            model="chat", messages=[{"role": "user", "content": QUESTION[0]["content"]}]
        )
        request.sampling.temperature = 0
        request.sampling.max_tokens = 32
        reply_type = GetMessageClass(method.output_type)
        call = channel.unary_stream(
            "/shoal.v1.Router/Chat",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply_type.FromString,
        )
        chunks = list(call(request, timeout=60))
    assert "Paris" in "".join(chunk.text for chunk in chunks)
    assert chunks[-1].usage.completion_tokens > 0


def test_prometheus_parses_the_metrics(two_replicas: Any, http: httpx.Client) -> None:
    """Router and engine metrics parse, carry the prefix, and count what was served."""
    http.post("/v1/completions", json={"model": "chat", "prompt": "hi", "max_tokens": 2})
    families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    served = sum(
        sample.value
        for sample in families["shoal_requests"].samples
        if sample.name.endswith("_total") and sample.labels["code"] == "200"
    )
    assert served >= 1
    for needed in ("shoal_queue_depth", "shoal_time_to_first_token_seconds"):
        assert needed in families
    worker = next(pod for pod in two_replicas.get("pods") if pod["service"] == "chat")
    text = httpx.get(f"http://127.0.0.1:{worker['ports']['metrics']}/metrics").text
    engine = {family.name for family in text_string_to_metric_families(text)}
    assert {"shoal_kv_blocks_total", "shoal_step_seconds", "shoal_generation_tokens"} <= engine
