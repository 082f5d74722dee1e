// JSON as a configuration has it, and the ways in which it can be none. What config.json means is tested from Rust
// (src/checkpoint/config.rs), which has the published forms.
#include <string>

#include "check.h"
#include "config/config.h"
#include "config/json.h"
#include "core/error.h"

using namespace gemma_cuda;

namespace {

void values_are_what_was_written() {
  const Json json =
      Json::parse(R"( { "a" : [1, -2.5e-3 , true,null,"x"], "b":{}, "a\u0062":"\u00e9\ud83d\ude00\n\/", "b":7 } )");
  CHECK(json.kind() == Json::Kind::object);
  const Json& a = *json.member("a");
  CHECK(a.array().size() == 5 && a.raw() == R"([1, -2.5e-3 , true,null,"x"])");
  CHECK(a.array()[0].whole() == 1u && a.array()[1].finite() == -2.5e-3 && !a.array()[1].whole());
  CHECK(a.array()[2].boolean() && a.array()[3].kind() == Json::Kind::null && a.array()[4].string() == "x");
  CHECK(json.member("ab")->string() == "\u00e9\U0001F600\n/");
  CHECK(json.member("b")->whole() == 7u);  // the last of its name
  CHECK(json.member("c") == nullptr);
  for (const char* number : {"4294967296", "-1", "1.0", "1e2", "\"1\"", "18446744073709551616"})
    CHECK(!Json::parse(number).whole());
  for (const char* number : {"1e999", "-1e999", "true"}) CHECK(!Json::parse(number).finite());
  CHECK(Json::parse("0").whole() == 0u && Json::parse("4294967295").whole() == 4294967295u);
}

void what_is_no_json_is_refused_at_its_byte() {
  for (const char* text : {"",           " ",
                           "{",          "[1,]",
                           "{\"a\":}",   "{\"a\" 1}",
                           "{a:1}",      "[1 2]",
                           "tru",        "01",
                           "1.",         "-",
                           "1e",         "+1",
                           ".5",         "nul",
                           "\"a",        "\"\\x\"",
                           "\"\\u12\"",  "\"\\ud800\"",
                           "\"a\nb\"",   "{} {}",
                           "[1]]",       "NaN",
                           "\"\\u 12\"", "\"\\ud800\\u0041\"",
                           "{\"a\":1,}"})
    test::check_throws("not valid JSON: ", [&] { Json::parse(text); });
  test::check_throws("at byte 4", [] { Json::parse("[1, x]"); });
  test::check_throws("nest more than 64", [] { Json::parse(std::string(100'000, '[')); });
  CHECK(Json::parse(std::string(64, '[') + std::string(64, ']')).kind() == Json::Kind::array);
  const std::string zero("[1\0]", 4);
  test::check_throws("not valid JSON", [&] { Json::parse(zero); });
}

// Any cut of a text, and any byte of it changed, is read or refused.
void damaged_text_is_read_or_refused() {
  const std::string text =
      R"({"model_type": "gemma2", "vocab_size": 64, "hidden_size": 32, "layer_types": ["full_attention"], "x": "\u00e9"})";
  const auto survives = [](const std::string& damaged) {
    try {
      parse_config(damaged);
    } catch (const Error& error) {
      CHECK(error.kind() == Error::Kind::invalid_argument);
    }
  };
  for (size_t i = 0; i < text.size(); ++i) {
    survives(text.substr(0, i));
    for (int round = 0; round < 8; ++round) {
      std::string damaged = text;
      damaged[i] = static_cast<char>(test::below(256));
      survives(damaged);
    }
  }
}

void members_are_named_where_they_are_wrong() {
  const auto refused = [](const char* what, const char* json) {
    test::check_throws(what, [&] { parse_config(json); });
  };
  refused("the top level is not a JSON object", "[]");
  refused("`model_type` is missing", "{}");
  refused("`model_type` is 3, which is not a string", R"({"model_type": 3})");
  refused("`hidden_size` is missing", R"({"model_type": "gemma", "num_hidden_layers": 1, "vocab_size": 8})");
  refused("which is not above 0", R"({"model_type": "gemma3_text", "rms_norm_eps": 0})");
  refused("\"mamba\" is not supported", R"({"model_type": "mamba"})");
  CHECK(parse_config(R"({"model_type": "gemma3_text", "vocab_size": 64})").vocab_given);
  const ModelConfig nested = parse_config(R"({"model_type": "gemma3", "text_config": {"num_hidden_layers": 7}})");
  CHECK(!nested.vocab_given && nested.spec.layers.size() == 7 && nested.spec.layers[5].window == 0);
}

}  // namespace

int main() {
  values_are_what_was_written();
  what_is_no_json_is_refused_at_its_byte();
  damaged_text_is_read_or_refused();
  members_are_named_where_they_are_wrong();
}
