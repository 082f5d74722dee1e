//! The checkpoint's own chat template, rendered as transformers renders it.

use std::path::Path;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value as TemplateValue};
use minijinja::{Environment, Error as TemplateError, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fields::read_object;
use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `user`, `assistant` or `system`, as the template knows them.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// Any role the template knows.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }

    /// From the one who asks.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A turn of the model's.
    pub fn model(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// What holds for the whole conversation; not every template takes it.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// A Jinja template that turns a conversation into a prompt.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// From `chat_template.jinja`, or the `chat_template` of `chat_template.json` or `tokenizer_config.json`.
    pub(super) fn read(dir: &Path) -> Result<Option<Self>> {
        let read = |name: &str| {
            let path = dir.join(name);
            if path.exists() { read_object(&path) } else { Ok(Default::default()) }
        };
        let tokenizer_config = read("tokenizer_config.json")?;
        let jinja = dir.join("chat_template.jinja");
        let source = if jinja.exists() {
            Some(std::fs::read_to_string(&jinja).map_err(|source| Error::io(&jinja, source))?)
        } else {
            let json = read("chat_template.json")?;
            named_template(json.get("chat_template")).or(named_template(tokenizer_config.get("chat_template")))
        };
        let token = |name: &str| special_token(tokenizer_config.get(name));
        source.map(|source| Self::new(source, token("bos_token"), token("eos_token"))).transpose()
    }

    /// A template of one's own.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] saying where it is not valid Jinja.
    pub fn new(source: String, bos_token: String, eos_token: String) -> Result<Self> {
        let mut environment = Environment::new();
        // As transformers sets them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, TemplateError> {
            Err(TemplateError::new(ErrorKind::InvalidOperation, message))
        });
        environment.set_fuel(Some(10_000_000)); // a template that loops for ever is an error, not a hang
        environment
            .add_template_owned("chat", source)
            .map_err(|error| Error::Tokenizer(format!("the chat template is not valid: {error}")))?;
        Ok(ChatTemplate { environment: Arc::new(environment), bos_token, eos_token })
    }

    /// The prompt for these messages; with `add_generation_prompt` it ends where the model's turn begins. It holds
    /// the beginning-of-text token already.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the template's own words, for instance when roles do not alternate.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::Tokenizer("a conversation needs at least one message".into()));
        }
        let values = context! {
            messages => TemplateValue::from(Serde(messages)),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        let rendered = self.environment.get_template("chat").and_then(|template| template.render(values));
        rendered.map_err(|error| {
            Error::Tokenizer(format!("the chat template refuses: {}", error.detail().unwrap_or(&error.to_string())))
        })
    }
}

/// A string, or a list of named templates of which the default is meant.
fn named_template(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default").or(named.first())?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// A string, or an object with its `content`.
fn special_token(value: Option<&Value>) -> String {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    value.and_then(|value| text(value).or_else(|| text(&value["content"]))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> Result<ChatTemplate> {
        ChatTemplate::new(source.into(), "<bos>".into(), "<eos>".into())
    }

    #[test]
    fn renders_python_methods_and_both_block_settings() {
        let template = template(
            "{{ bos_token }}{% for message in messages %}\n    {% if message.content.startswith(' ') %}\n\
             {{ message['role'].upper() }}:{{ message.content | trim }}\n    {% endif %}\n{% endfor %}\n\
             {% if add_generation_prompt %}MODEL:{% endif %}",
        );
        let rendered = template.unwrap().render(&[Message::user(" hi "), Message::user("no")], true).unwrap();
        assert_eq!(rendered, "<bos>USER:hi\nMODEL:");
    }

    #[test]
    fn errors_say_what_is_wrong() {
        assert!(template("{% if %}").unwrap_err().to_string().contains("not valid"));
        let strict = template("{{ raise_exception('Conversation roles must alternate') }}").unwrap();
        assert!(strict.render(&[Message::user("a")], true).unwrap_err().to_string().contains("must alternate"));
        assert!(strict.render(&[], true).unwrap_err().to_string().contains("at least one"));
        let endless = template("{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}");
        assert!(endless.unwrap().render(&[Message::user("a")], true).is_err());
    }

    #[test]
    fn named_templates_and_token_objects() {
        let named = serde_json::json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
        assert_eq!(named_template(Some(&named)).as_deref(), Some("D"));
        assert_eq!(special_token(Some(&serde_json::json!({"content": "<bos>"}))), "<bos>");
    }
}
