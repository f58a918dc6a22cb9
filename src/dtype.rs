//! Element types: how the stored types of safetensors map to the floats that can be merged.
//!
//! - [`Dtype`] is the safetensors type as stored; everything in a file has one.
//! - [`Float`] is the subset whose values are numbers that can be averaged: exactly convertible to f32 (f64 rounds).
//! - Scale-only types (F8_E8M0), sub-byte and FNUZ floats, integers and booleans are not mergeable: they are copied.

pub use safetensors::Dtype;

/// A mergeable floating-point type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Float {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// OCP 8-bit float E4M3 (finite, largest 448, one NaN pattern per sign).
    E4M3,
    /// OCP 8-bit float E5M2 (has infinities, largest finite 57344).
    E5M2,
}

impl Float {
    /// Every mergeable type, widest first.
    pub const ALL: [Self; 6] = [Self::F64, Self::F32, Self::F16, Self::BF16, Self::E4M3, Self::E5M2];

    /// The mergeable float stored as `dtype`, if it is one.
    pub fn from_dtype(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F64 => Some(Self::F64),
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::BF16),
            Dtype::F8_E4M3 => Some(Self::E4M3),
            Dtype::F8_E5M2 => Some(Self::E5M2),
            _ => None,
        }
    }

    /// The type as safetensors stores it.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F64 => Dtype::F64,
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
            Self::E4M3 => Dtype::F8_E4M3,
            Self::E5M2 => Dtype::F8_E5M2,
        }
    }

    /// Bytes per element.
    pub const fn width(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::E4M3 | Self::E5M2 => 1,
        }
    }

    /// The name that `config.json` and PyTorch use.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::E4M3 => "float8_e4m3fn",
            Self::E5M2 => "float8_e5m2",
        }
    }
}

/// The name of a stored type as written in a safetensors header.
pub fn dtype_name(dtype: Dtype) -> String {
    // The crate's own serialisation is the authority on the names.
    match serde_json::to_value(dtype) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{dtype:?}"),
    }
}
