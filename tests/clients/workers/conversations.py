"""What the clients ask in the tests, and what the model of the tests has learned to answer.

Plain data and nothing to import, since it is read in the clients' environments as well as in ours.
"""

from __future__ import annotations

from typing import Any

MODEL = "tiny"
HELLO, HELLO_ANSWER = "Say hello.", "Hello! How can I help you today?"
SUM, SUM_REASONING, SUM_ANSWER = "What is 2 + 3?", "2 and 3 are 5.", "The sum is 5."
WEATHER, TIME_AND_WEATHER = "How is the weather in Paris?", "How is the weather in Paris, and what time is it in Oslo?"
WEATHER_RESULT, WEATHER_ANSWER = "18 degrees and sunny", "It is sunny in Paris, at 18 degrees."
TIME_RESULT, BOTH_ANSWER = "12:30", "It is sunny in Paris, and 12:30 in Oslo."

CITY = {"type": "string", "enum": ["Paris", "Oslo"]}
WEATHER_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": CITY, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TIME_PARAMETERS: dict[str, Any] = {
    "type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False,
}  # fmt: skip
FUNCTIONS: list[dict[str, Any]] = [
    {"name": "get_weather", "description": "The weather of a city.", "parameters": WEATHER_PARAMETERS},
    {"name": "get_time", "description": "The time of a city.", "parameters": TIME_PARAMETERS},
]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": function} for function in FUNCTIONS]
ANTHROPIC_TOOLS: list[dict[str, Any]] = [
    {"name": each["name"], "description": each["description"], "input_schema": each["parameters"]} for each in FUNCTIONS
]
WEATHER_CALL = {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'}
TIME_CALL = {"name": "get_time", "arguments": '{"city": "Oslo"}'}

# Few values each, so that any model comes to an end under it.
FORECAST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": CITY,
        "sky": {"type": "string", "enum": ["sunny", "cloudy", "rain"]},
        "warm": {"type": "boolean"},
    },
    "required": ["city", "sky", "warm"],
    "additionalProperties": False,
}


def user(text: str) -> list[dict[str, Any]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def fits_forecast(value: Any) -> bool:
    """Whether ``value`` is what ``FORECAST_SCHEMA`` describes."""
    return (
        isinstance(value, dict)
        and value.keys() == {"city", "sky", "warm"}
        and value["city"] in CITY["enum"]
        and value["sky"] in ("sunny", "cloudy", "rain")
        and isinstance(value["warm"], bool)
    )
