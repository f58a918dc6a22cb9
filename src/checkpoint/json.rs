//! Values inside JSON that are none of our business, read without keeping them.
//!
//! - Parsed in full, unlike with `serde::de::IgnoredAny`: bad escapes, numbers out of range and nesting beyond
//!   serde_json's limit are refused, as the reference implementation of safetensors does.
//! - Nothing is stored, so a hostile file cannot make a small text into large objects.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

/// Any JSON value; its number if it is an unsigned integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loose(pub(super) Option<u64>);

impl<'de> Deserialize<'de> for Loose {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LooseVisitor)
    }
}

struct LooseVisitor;

impl<'de> Visitor<'de> for LooseVisitor {
    type Value = Loose;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_u64<E>(self, value: u64) -> Result<Loose, E> {
        Ok(Loose(Some(value)))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Loose, E> {
        Ok(Loose(None))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Loose, E> {
        Ok(Loose(None))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Loose, E> {
        Ok(Loose(None))
    }

    fn visit_str<E>(self, _: &str) -> Result<Loose, E> {
        Ok(Loose(None))
    }

    fn visit_unit<E>(self) -> Result<Loose, E> {
        Ok(Loose(None))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Loose, A::Error> {
        while seq.next_element::<Loose>()?.is_some() {}
        Ok(Loose(None))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Loose, A::Error> {
        while map.next_entry::<Loose, Loose>()?.is_some() {}
        Ok(Loose(None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_value_is_taken_and_only_integers_are_kept() {
        for text in ["null", "true", "-1", "1.5", "\"a\"", "[1, [2]]", r#"{"a": {"b": []}}"#] {
            assert_eq!(serde_json::from_str::<Loose>(text).unwrap(), Loose(None), "{text}");
        }
        assert_eq!(serde_json::from_str::<Loose>("18446744073709551615").unwrap(), Loose(Some(u64::MAX)));
    }

    #[test]
    fn what_a_full_parse_refuses_is_refused() {
        for text in [r#""\ud800""#, "1e999", "[1,]", "{1: 2}", "01"] {
            assert!(serde_json::from_str::<Loose>(text).is_err(), "{text}");
        }
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        assert!(serde_json::from_str::<Loose>(&deep).is_err());
    }
}
