"""Text that may be shown: no credential passes, what is none stays, terminals are given nothing to obey."""

import io
import logging
import os
import re
import shlex
import subprocess
import sys

import pytest

from cluster.command import LogFormatter
from cluster.ray_runtime import FORWARDED, take_variables, withheld_variables
from cluster.redact import address_without_credentials, cleaned, printable, without_credentials
from tests.running import REPOSITORY

ADDRESSES = {
    "http://me:hush@host/a.jpg": "http://host/a.jpg",
    "HTTPS://hush@host/a.jpg": "HTTPS://host/a.jpg",
    "https://me:hush'hush\"hush@host:80/a": "https://host:80/a",
    "https://me:hush/hush?hush#hush@host/a": "https://host/a",
    "https://me:hush@hush@host/": "https://host/",
    "postgresql+psycopg2://me:hush@host/mlflow": "postgresql+psycopg2://host/mlflow",
    "http://h/a?api_key=hush&size=3": "http://h/a?size=3",
    "http://h/a?size=3&API-Key=hush": "http://h/a?size=3",
    "http://h/a?size=3;apikey=hush": "http://h/a?size=3",
    "http://h/a?key=hush": "http://h/a",
    "http://h/a?b=1&token=hush&c=2": "http://h/a?b=1&c=2",
    "http://h/a?Password=hush": "http://h/a",
    "http://h/a?pwd=hush": "http://h/a",
    "http://h/a?auth=hush": "http://h/a",
    "http://h/a?auth_token=hush": "http://h/a",
    "http://h/a?authorization=hush": "http://h/a",
    "http://h/a?jwt=hush": "http://h/a",
    "http://h/a?sv=2020&sig=hush": "http://h/a?sv=2020",
    "http://h/a?client_secret=hush": "http://h/a",
    "http://h/a?clientSecret=hush": "http://h/a",
    "http://h/a?accessToken=hush": "http://h/a",
    "http://h/a?ACCESS_TOKEN=hush": "http://h/a",
    "http://h/a?X-Amz-Signature=hush&x-amz-credential=hush&X-Amz-Date=hush": "http://h/a",
    "http://h/a?X-Goog-Credential=hush": "http://h/a",
    "http://h/a?AWSAccessKeyId=hush&Signature=hush&Expires=hush": "http://h/a",
    "http://h/a?%61pi%5Fkey=hush": "http://h/a",
    "http://h/a;jsessionid=hush/b": "http://h/a/b",
    "http://h/a?url=https%3A%2F%2Fme%3Ahush%40x%2Fb%3Ftoken%3Dhush": "http://h/a?url=https%3A%2F%2Fx%2Fb",
    "http://h/a#access_token=hush": "http://h/a",
    "http://h/a?b=1#hush": "http://h/a?b=1",
    "s3://bucket/a?X-Amz-Signature=hush": "s3://bucket/a",
    "http://h/a?MYAPIKEY=hush&sessiontoken=hush&dbPassword=hush&pw=hush": "http://h/a",
    "http://h/a?u=http%253A%252F%252Fme%253Ahush%2540x%252Fb": "http://h/a?u=http%3A%2F%2Fx%2Fb",
    "postgresql://h/db?options=-c%20password%3Dhush": "postgresql://h/db?options=-c%20password%3D%2A%2A%2A",
    "http://h/a?b=1%26token%3Dhush": "http://h/a?b=1%26token%3D%2A%2A%2A",
}
KEPT = [
    "http://h/a.jpg?keyword=cat&author=me&monkey=2&page=1",
    "http://h:8080/@scope/a@2x.png",
    "http://[::1]:5000/a",
    "s3://bucket/dir/a#1@2x.png",
    "sqlite:////home/me/a@b#2/mlflow.db",
    "models:/pets@champion is at http://h:80: start it, or set MLFLOW_TRACKING_URI",
    "/data/token=3/a@b:c.jpg",
    "s3://BUCKET/FOLDER",
    "12:30:01 class token: the first of 197; its secret: none; me@host.example",
    "step 450/562, loss 0.2128, lr 2.12e-04",
    "registry.alias = 'latest' is reserved; data.key = 3, auth = none",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_credential_stays_in_an_address_or_in_a_text_around_it(address):
    assert address_without_credentials(address) == without_credentials(address) == ADDRESSES[address]
    for text in ("MLflow at {} does not answer", "(caused by '{}'): retry", '["{}", 1]', "data.corpus={}"):
        if not ('"' in address and '"' in text):
            assert "hush" not in without_credentials(text.format(address))
    assert "hush" not in without_credentials(shlex.join(["pretrain.py", f"data.corpus={address}"]))


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_credential_stays_as_it_is(text):
    assert without_credentials(text) == text
    assert " " in text or address_without_credentials(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "Max retries exceeded with url: /api/2.0/get?key=hush&x=1 (Caused by ...)",
        "env MLFLOW_TRACKING_PASSWORD=hush AWS_SECRET_ACCESS_KEY=hush MLFLOW_TRACKING_TOKEN='hush hush' python a.py",
        '{"password": "hush", "X-Api-Key": \'hush\'}',
        "Authorization: Bearer hush.hush-hush",
        "{'Authorization': 'Basic aHVzaA==hush'}",
        "password = 'hush'",
        "password: hush",
        "X-Amz-Security-Token: hush",
        "access_token: 'hush hush'",
        "cannot log in as me:hush@host.example",
        "http://me:hush@h is not http://me:hush@i?token=hush",
        "no host in //me:hush@host.example/a, in https:/me:hush@host and in 'http:\\\\me:hush@host'",
        r'{"body": "{\"password\": \"hush hush\", \"a\": 1}", "b": "password=\"hush\""}',
        "cut short: password='hush",
        "Set-Cookie: sid=hush; Path=/",
        "psql --host h --password hush --api-key 'hush hush'",
    ],
)
def test_no_credential_stays_in_a_text(text):
    assert "hush" not in without_credentials(text)
    assert "hush" not in str(cleaned({"a": [text, {"b": (text,)}], "c": 1}))


def test_addresses_in_addresses_end_somewhere():
    address = "https://h?u=" + "http%3A//h%3Fu%3D" * 500 + "hush"
    assert without_credentials(address).startswith("https://h?u=")
    assert "hush" not in without_credentials(address)


def test_control_characters_are_shown_and_not_obeyed():
    name = "cat\x1b[2J\r\nERROR all is lost\x07\x9b\u202egnp.exe\udcff"
    assert printable(name) == r"cat\x1b[2J\r\nERROR all is lost\x07\x9b\u202egnp.exe\udcff"
    assert printable("Hündin 猫 $x^2$ می‌خواهم 👩‍🚀") == "Hündin 猫 $x^2$ می‌خواهم 👩‍🚀"
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter())
    try:
        raise RuntimeError(f"{name} http://me:hush@h")
    except RuntimeError:
        record = logging.LogRecord("vitforge", 20, "", 0, "class %s at %s", (name, "http://me:hush@h"), sys.exc_info())
    handler.emit(record)
    first, *trace = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d class cat\\x1b\[2J.* at http://h", first)
    assert trace[0] == "Traceback (most recent call last):"
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]|hush", stream.getvalue())


def test_neither_messages_nor_traces_of_a_command_show_credentials():
    for kind, status in (("ValueError", 2), ("RuntimeError", 1)):
        text = "http://me:hush@h/a?api_key=hush \\x1b[2J"
        code = f"from cluster.command import run_command\ndef main(): raise {kind}('{text}')\nrun_command(main)"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == status
        assert "http://h/a \\x1b[2J" in done.stderr
        assert "hush" not in done.stderr.replace(code, "")


def test_what_ray_would_log_travels_to_its_workers_otherwise(monkeypatch):
    for name in list(os.environ):
        if name.startswith(FORWARDED):
            monkeypatch.delenv(name)
    secret = {
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "hush",
        "MLFLOW_TRACKING_TOKEN": "hush",
        "MLFLOW_REGISTRY_URI": "postgresql://me:hush@host/mlflow",
        "AWS_ACCESS_KEY_ID": "hush",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_ENDPOINT_URL": "https://me:hush@host",
    }
    for name, value in {**secret, "AWS_REGION": "x", "MLFLOW_TRACKING_URI": "http://host", "HOME_TOKEN": "own"}.items():
        monkeypatch.setenv(name, value)
    withheld = withheld_variables()
    assert withheld == secret
    for name in secret:
        monkeypatch.delenv(name)
    with monkeypatch.context() as node:
        node.setenv("MLFLOW_TRACKING_TOKEN", "of the node")
        node.setenv("AWS_PROFILE", "of the node")
        take_variables(withheld)
        assert os.environ["MLFLOW_TRACKING_TOKEN"] == os.environ["MLFLOW_TRACKING_PASSWORD"] == "hush"
        assert os.environ["AWS_ENDPOINT_URL"] == secret["AWS_ENDPOINT_URL"]
        assert "AWS_SECRET_ACCESS_KEY" not in os.environ, "it has a profile of its own"
    for name in secret:
        os.environ.pop(name, None)
    take_variables(withheld)
    assert secret.items() <= os.environ.items()
    for name in secret:
        os.environ.pop(name, None)
