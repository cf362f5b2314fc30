import pytest

from tests.attack.scale import scaled


def test_the_short_form_is_the_default(monkeypatch):
    monkeypatch.delenv("VHEAD_ATTACK_SCALE", raising=False)
    assert scaled(3, 300) == 3


def test_the_long_form_is_asked_for(monkeypatch):
    monkeypatch.setenv("VHEAD_ATTACK_SCALE", "long")
    assert scaled(3, 300) == 300


def test_a_typing_mistake_is_no_short_form(monkeypatch):
    monkeypatch.setenv("VHEAD_ATTACK_SCALE", "lnog")
    with pytest.raises(ValueError, match="expected short or long, got 'lnog'"):
        scaled(3, 300)
