//! Typed reading of a JSON object's fields, with errors that name file, field and value.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Reads a JSON file whose top level is an object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::config(path, format!("not valid JSON: {error}")))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(Error::config(path, "the top level is not a JSON object")),
    }
}

/// The fields of one object. A field that is absent or null reads as `None`, unless said otherwise.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Fields { path, map }
    }

    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::config(self.path, message)
    }

    fn wrong(&self, name: &str, wanted: &str) -> Error {
        let whole = self.map[name].to_string();
        let mut value: String = whole.chars().take(60).collect();
        if value.len() < whole.len() {
            value.push('…');
        }
        self.error(format!("`{name}` is {value}, which is not {wanted}"))
    }

    /// Whether the field is there, be it null.
    pub fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field has a value other than null.
    pub fn given(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// All fields, each of which is to be an object.
    pub fn objects(self) -> impl Iterator<Item = Result<Fields<'a>>> {
        self.map.keys().map(move |name| {
            self.object(name)?.ok_or_else(|| self.error(format!("`{name}` is null, which is not an object")))
        })
    }

    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { path: self.path, map })),
            Some(_) => Err(self.wrong(name, "an object")),
        }
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, "a string"))
    }

    pub fn boolean(&self, name: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(name, "true or false"))
    }

    /// A whole number that fits 32 bits.
    pub fn count(&self, name: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let whole = value.as_u64().and_then(|number| u32::try_from(number).ok());
        whole.map(Some).ok_or_else(|| self.wrong(name, "a whole number from 0 to 4294967295"))
    }

    /// A finite number.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().filter(|number| number.is_finite()).map(Some).ok_or_else(|| self.wrong(name, "a finite number"))
    }

    pub fn strings(&self, name: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let strings = value.as_array().and_then(|values| values.iter().map(Value::as_str).collect());
        strings.map(Some).ok_or_else(|| self.wrong(name, "a list of strings"))
    }

    /// Token ids, one or a list of them.
    pub fn token_ids(&self, name: &str) -> Result<Vec<u32>> {
        let wrong = || self.wrong(name, "a token id or a list of them");
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong);
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }
}
