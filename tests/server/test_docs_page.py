import base64
import re

import httpx

from tests.server.running import HEADERS, KEY, Served


def test_the_page_fetches_nothing_from_elsewhere(served: Served) -> None:
    page = httpx.get(f"{served.url}/docs", headers=HEADERS)
    assert page.status_code == 200
    places = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text) + re.findall(r"url: '([^']+)'", page.text)
    assert len(places) == 4
    for place in places:
        assert "//" not in place
        if not place.startswith("data:"):
            found = httpx.get(f"{served.url}/{place}", headers=HEADERS)
            assert found.status_code == 200
            assert len(found.content) > 1000
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_a_browser_is_asked_for_the_key_and_can_give_it(served: Served) -> None:
    for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json"):
        refused = httpx.get(served.url + path)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Basic realm="Ingot"')
        assert httpx.get(served.url + path, auth=("anybody", KEY)).status_code == 200
        assert httpx.get(served.url + path, auth=("anybody", "wrong")).status_code == 401
    assert httpx.get(f"{served.url}/v1/models").headers["www-authenticate"] == "Bearer"
    for wrong in ("Basic", "Basic ???", "Basic " + base64.b64encode(KEY.encode()).decode(), f"Digest {KEY}", KEY):
        assert httpx.get(f"{served.url}/docs", headers={"Authorization": wrong}).status_code == 401


def test_every_route_is_described(served: Served) -> None:
    paths = httpx.get(f"{served.url}/openapi.json", headers=HEADERS).json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/v1/chat/interactive"} <= set(paths)
    assert paths["/generate"]["post"]["deprecated"]
