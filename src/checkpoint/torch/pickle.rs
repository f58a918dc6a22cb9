//! A pickle machine that can make tensors' descriptions and nothing else.
//!
//! - Nothing is ever called: the few globals that are allowed are words, and applying one is a rule of this file.
//! - Opcodes and globals are allowed by exact value and name; everything else is refused, with its place.
//! - Values are entries of one table and name each other by number. So what contains itself does no harm, nothing is
//!   copied, and nothing recurses.
//! - Table, stack, marks and memo have one bound; a text is a range of the pickle.
//!
//! Opcodes: the comments of CPython's `pickletools`, protocols 2 to 5. What is applied: `torch/_utils.py`,
//! `torch/_tensor.py` and `torch/serialization.py`. Knows nothing of files.

use std::collections::HashMap;
use std::ops::Range;

use super::super::header;
use crate::dtype::Dtype;
use crate::error::{Error, Result, printable};
use crate::limits::{MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_PICKLE_VALUES, MAX_TENSORS};

/// Longest accepted name of a storage: PyTorch numbers them.
const MAX_KEY_BYTES: usize = 64;

/// A place in the table of values.
type Id = u32;

/// A storage: bytes of an archive member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StorageRef {
    /// Its member's name within the archive's `data` folder, as a range of the pickle.
    pub key: Range<usize>,
    /// Type of its elements; `None` if it is bytes, and tensors say their type.
    pub dtype: Option<Dtype>,
    /// How many elements (or bytes) it has.
    pub count: u64,
}

/// A tensor's description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorRef {
    pub storage: StorageRef,
    pub dtype: Dtype,
    /// Its first element, counted from the storage's begin.
    pub offset: u64,
    pub shape: Box<[u64]>,
    /// Elements between neighbours along each dimension.
    pub strides: Box<[u64]>,
}

/// A name that a pickle may use.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    /// `_rebuild_tensor` with this many arguments or more; the last one it needs is the type, in version 3.
    Tensor(u8),
    Parameter,
    FromType,
    /// A class that is only mentioned.
    Class,
    Size,
    Storage(Option<Dtype>),
    Dtype(Option<Dtype>),
    /// What makes numpy scalars, which are passed over.
    Scalar,
}

#[derive(Debug, Clone)]
enum Value {
    /// Of no interest.
    Other,
    Int(i64),
    Text(Range<usize>),
    Tuple(Box<[Id]>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Box<StorageRef>),
    Tensor(Box<TensorRef>),
    /// A tensor that is described in a way that is not supported: what, for the error if it is used.
    Unsupported(&'static str),
}

/// What the pickle describes: named tensors, and how many other entries there were.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub tensors: Vec<(Box<str>, TensorRef)>,
    /// Entries that are no tensors: how many, and the first one's name.
    pub others: (u64, Box<str>),
}

/// Reads the pickle `text`: a mapping from names to tensors, itself or under the key `state_dict`.
pub(super) fn read(text: &[u8]) -> Result<Contents> {
    let mut machine =
        Machine { text, at: 0, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let top = machine.run().map_err(|what| {
        let at = machine.at;
        Error::input(format!("data.pkl, byte {at}: {what}"))
    })?;
    machine.contents(top)
}

struct Machine<'t> {
    text: &'t [u8],
    /// The next byte.
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Lengths of the stack at the marks that are open.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

/// What is wrong, without its place.
type Step<T> = std::result::Result<T, String>;

impl Machine<'_> {
    /// Runs to the end; the result is what is left on the stack.
    fn run(&mut self) -> Step<Id> {
        loop {
            let begin = self.at;
            let [opcode] = self.take()?;
            if opcode == b'.' {
                return self.pop();
            }
            if let Err(what) = self.step(opcode) {
                // The place of the opcode tells more than where reading ended.
                self.at = begin;
                return Err(what);
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            0x80 => self.protocol(),
            0x95 => self.take::<8>().map(drop),
            b'(' => self.mark(),
            b'N' | 0x88 | 0x89 => self.push(Value::Other),
            b'K' => self.take().and_then(|[byte]| self.push(Value::Int(byte.into()))),
            b'M' => self.take().map(u16::from_le_bytes).and_then(|x| self.push(Value::Int(x.into()))),
            b'J' => self.take().map(i32::from_le_bytes).and_then(|x| self.push(Value::Int(x.into()))),
            0x8a => self.long(),
            b'G' => self.take::<8>().and_then(|_| self.push(Value::Other)),
            b'X' => self.take().map(u32::from_le_bytes).and_then(|length| self.string(length.into())),
            0x8c | b'U' => self.take().and_then(|[length]| self.string(length.into())),
            0x8d => self.take().map(u64::from_le_bytes).and_then(|length| self.string(length)),
            b'T' => self.take().map(u32::from_le_bytes).and_then(|length| self.string(length.into())),
            b'C' => self.take().and_then(|[length]| self.bytes(length.into())),
            b'B' => self.take().map(u32::from_le_bytes).and_then(|length| self.bytes(length.into())),
            b')' => self.push(Value::Tuple(Box::default())),
            0x85..=0x87 => self.tuple(self.stack.len().checked_sub(usize::from(opcode - 0x84))),
            b't' => {
                let from = self.close()?;
                self.tuple(Some(from))
            }
            b']' => self.push(Value::List(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b'a' => self.append(self.stack.len().checked_sub(1)),
            b'e' => {
                let from = self.close()?;
                self.append(Some(from))
            }
            b's' => self.set_items(self.stack.len().checked_sub(2)),
            b'u' => {
                let from = self.close()?;
                self.set_items(Some(from))
            }
            b'q' => self.take().and_then(|[key]| self.remember(key.into())),
            b'r' => self.take().map(u32::from_le_bytes).and_then(|key| self.remember(key)),
            0x94 => self.remember(self.memo.len() as u32),
            b'h' => self.take().and_then(|[key]| self.recall(key.into())),
            b'j' => self.take().map(u32::from_le_bytes).and_then(|key| self.recall(key)),
            b'c' => self.global(),
            0x93 => self.stack_global(),
            b'Q' => self.persistent(),
            b'R' => self.apply(),
            b'b' => self.pop().map(drop),
            _ => Err(format!("opcode {opcode:#04x} is not one that tensors need")),
        }
    }

    fn take<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.text[self.at..].first_chunk().ok_or("the pickle ends in the middle")?;
        self.at += N;
        Ok(*bytes)
    }

    /// The next `length` bytes, as a range.
    fn range(&mut self, length: u64) -> Step<Range<usize>> {
        let left = (self.text.len() - self.at) as u64;
        if length > left {
            return Err(format!("a text of {length} bytes, but {left} are left"));
        }
        let begin = self.at;
        self.at += length as usize;
        Ok(begin..self.at)
    }

    fn protocol(&mut self) -> Step<()> {
        let [version] = self.take()?;
        match version {
            2..=5 => Ok(()),
            _ => Err(format!("pickle protocol {version} is not supported")),
        }
    }

    fn string(&mut self, length: u64) -> Step<()> {
        let range = self.range(length)?;
        std::str::from_utf8(&self.text[range.clone()]).map_err(|_| "a text that is not UTF-8")?;
        self.push(Value::Text(range))
    }

    fn bytes(&mut self, length: u64) -> Step<()> {
        self.range(length)?;
        self.push(Value::Other)
    }

    fn long(&mut self) -> Step<()> {
        let [length] = self.take()?;
        let range = self.range(length.into())?;
        let digits = &self.text[range];
        let negative = digits.last().is_some_and(|last| last & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 8];
        if digits.len() > number.len() {
            return Err(format!("a number of {length} bytes"));
        }
        number[..digits.len()].copy_from_slice(digits);
        self.push(Value::Int(i64::from_le_bytes(number)))
    }

    fn push(&mut self, value: Value) -> Step<()> {
        if self.values.len() >= MAX_PICKLE_VALUES {
            return Err(format!("more than {MAX_PICKLE_VALUES} values"));
        }
        self.values.push(value);
        self.push_id(self.values.len() as Id - 1)
    }

    fn push_id(&mut self, id: Id) -> Step<()> {
        if self.stack.len() >= MAX_PICKLE_VALUES {
            return Err(format!("more than {MAX_PICKLE_VALUES} values on the stack"));
        }
        self.stack.push(id);
        Ok(())
    }

    /// Takes the top of the stack, but nothing below the last mark.
    fn pop(&mut self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => self.stack.pop().ok_or_else(empty),
            false => Err(empty()),
        }
    }

    fn value(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    fn mark(&mut self) -> Step<()> {
        if self.marks.len() >= MAX_PICKLE_VALUES {
            return Err(format!("more than {MAX_PICKLE_VALUES} marks"));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    /// Ends the last mark: where what follows it begins.
    fn close(&mut self) -> Step<usize> {
        self.marks.pop().ok_or_else(|| "no mark is open".into())
    }

    /// What is on the stack from `from` on, which must not reach below a mark.
    fn split(&mut self, from: Option<usize>) -> Step<Vec<Id>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let from = from.filter(|&from| from >= floor).ok_or_else(empty)?;
        Ok(self.stack.split_off(from))
    }

    fn tuple(&mut self, from: Option<usize>) -> Step<()> {
        let items = self.split(from)?;
        self.push(Value::Tuple(items.into()))
    }

    fn append(&mut self, from: Option<usize>) -> Step<()> {
        let items = self.split(from)?;
        let target = self.top()?;
        match &mut self.values[target as usize] {
            Value::List(list) => list.extend(items),
            Value::Other => {}
            _ => return Err("items for something that is not a list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, from: Option<usize>) -> Step<()> {
        let items = self.split(from)?;
        if !items.len().is_multiple_of(2) {
            return Err("a key without a value".into());
        }
        let target = self.top()?;
        match &mut self.values[target as usize] {
            Value::Dict(entries) => entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Value::Other => {}
            _ => return Err("entries for something that is not a mapping".into()),
        }
        Ok(())
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack[floor..].last().copied().ok_or_else(empty)
    }

    fn remember(&mut self, key: u32) -> Step<()> {
        let top = self.top()?;
        if self.memo.len() >= MAX_PICKLE_VALUES {
            return Err(format!("more than {MAX_PICKLE_VALUES} memorised values"));
        }
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Step<()> {
        let id = *self.memo.get(&key).ok_or_else(|| format!("value {key} was never memorised"))?;
        self.push_id(id)
    }

    fn line(&mut self) -> Step<&str> {
        let rest = &self.text[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or("a name without an end")?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| "a name that is not UTF-8".into())
    }

    fn global(&mut self) -> Step<()> {
        let begin = self.at;
        let module_bytes = self.line()?.len();
        let name_bytes = self.line()?.len();
        let module = begin..begin + module_bytes;
        let name = module.end + 1..module.end + 1 + name_bytes;
        self.push_global(module, name)
    }

    fn stack_global(&mut self) -> Step<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        match (self.value(module), self.value(name)) {
            (Value::Text(module), Value::Text(name)) => self.push_global(module.clone(), name.clone()),
            _ => Err("a name that is not a text".into()),
        }
    }

    fn push_global(&mut self, module: Range<usize>, name: Range<usize>) -> Step<()> {
        let found = find(&self.text[module.clone()], &self.text[name.clone()]);
        let value = found.ok_or_else(|| {
            let (module, name) = (printable(self.str(&module)), printable(self.str(&name)));
            format!("the pickle names {module}.{name}, which tensors do not need: it is not read any further")
        })?;
        self.push(Value::Global(value))
    }

    /// A text that was checked when it was read. Takes time in proportion to its length.
    fn str(&self, range: &Range<usize>) -> &str {
        std::str::from_utf8(&self.text[range.clone()]).unwrap_or_default()
    }

    /// A storage, as `('storage', class, key, device, count)`.
    fn persistent(&mut self) -> Step<()> {
        let wrong = || "a reference to something that is not a storage".to_string();
        let id = self.pop()?;
        let Value::Tuple(items) = self.value(id) else { return Err(wrong()) };
        let [kind, class, key, _, count] = items[..] else { return Err(wrong()) };
        let (Value::Text(kind), Value::Global(class), Value::Text(key), Value::Int(count)) =
            (self.value(kind), self.value(class), self.value(key), self.value(count))
        else {
            return Err(wrong());
        };
        let (Global::Storage(dtype), b"storage") = (*class, &self.text[kind.clone()]) else { return Err(wrong()) };
        if key.len() > MAX_KEY_BYTES {
            return Err(format!("a storage's name has {} bytes, at most {MAX_KEY_BYTES} are accepted", key.len()));
        }
        let count = u64::try_from(*count).map_err(|_| format!("a storage of {count} elements"))?;
        let storage = StorageRef { key: key.clone(), dtype, count };
        self.push(Value::Storage(Box::new(storage)))
    }

    fn apply(&mut self) -> Step<()> {
        let (arguments, global) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments) = self.value(arguments) else { return Err("arguments that are no tuple".into()) };
        let Value::Global(global) = self.value(global) else {
            return Err("a call of something without a name".into());
        };
        match self.applied(*global, arguments)? {
            Made::Value(value) => self.push(value),
            Made::Known(id) => self.push_id(id),
        }
    }

    fn applied(&self, global: Global, arguments: &[Id]) -> Step<Made> {
        let value = match (global, arguments) {
            (Global::OrderedDict, []) => Value::Dict(Vec::new()),
            (Global::Tensor(version), arguments) => self.tensor(version, arguments)?,
            // A parameter is its data, a size its numbers.
            (Global::Parameter, [data, ..]) | (Global::Size, [data]) => return Ok(Made::Known(*data)),
            (Global::FromType, [function, _, arguments, ..]) => match (self.value(*function), self.value(*arguments)) {
                (Value::Global(Global::Tensor(version)), Value::Tuple(arguments)) => {
                    self.tensor(*version, arguments)?
                }
                _ => Value::Unsupported("a tensor of a class of its own"),
            },
            (Global::Scalar | Global::Dtype(_), _) => Value::Other,
            _ => return Err("arguments that do not fit what they are for".into()),
        };
        Ok(Made::Value(value))
    }

    /// `_rebuild_tensor(storage, offset, size, stride)`; further ones carry no data, but for the type in version 3.
    fn tensor(&self, version: u8, arguments: &[Id]) -> Step<Value> {
        let wrong = || "a tensor whose parts are not storage, offset, size and stride".to_string();
        let [storage, offset, shape, strides, rest @ ..] = arguments else { return Err(wrong()) };
        let (Value::Storage(storage), Value::Int(offset)) = (self.value(*storage), self.value(*offset)) else {
            return Err(wrong());
        };
        let offset = u64::try_from(*offset).map_err(|_| format!("a tensor that begins at element {offset}"))?;
        let named = match version {
            3 => match rest.get(2).map(|id| self.value(*id)) {
                Some(Value::Global(Global::Dtype(dtype))) => *dtype,
                _ => return Err("a tensor without a type".into()),
            },
            _ => storage.dtype,
        };
        let Some(dtype) = named else { return Ok(Value::Unsupported("a type that safetensors does not have")) };
        let (shape, strides) = (self.numbers(*shape)?, self.numbers(*strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of {} dimensions with {} strides", shape.len(), strides.len()));
        }
        Ok(Value::Tensor(Box::new(TensorRef { storage: (**storage).clone(), dtype, offset, shape, strides })))
    }

    fn numbers(&self, tuple: Id) -> Step<Box<[u64]>> {
        let Value::Tuple(items) = self.value(tuple) else { return Err("a size or stride that is no tuple".into()) };
        if items.len() > MAX_DIMENSIONS {
            return Err(format!("{} dimensions, but at most {MAX_DIMENSIONS} are accepted", items.len()));
        }
        let number = |id: &Id| match self.value(*id) {
            Value::Int(number) => u64::try_from(*number).map_err(|_| format!("the size or stride {number}")),
            _ => Err("a size or stride that is no number".into()),
        };
        items.iter().map(number).collect()
    }

    /// The named tensors of the mapping `top`.
    fn contents(&self, top: Id) -> Result<Contents> {
        let Value::Dict(entries) = self.value(top) else {
            return Err(Error::input("data.pkl holds no mapping from names to tensors").help(super::SAVE));
        };
        let nested = entries.iter().rev().find_map(|(key, value)| match (self.value(*key), self.value(*value)) {
            (Value::Text(key), Value::Dict(inner)) if self.str(key) == "state_dict" => Some(inner),
            _ => None,
        });
        let mut contents = Contents::default();
        for (key, value) in nested.unwrap_or(entries) {
            let Value::Text(key) = self.value(*key) else {
                contents.others.0 += 1;
                continue;
            };
            // Before it is copied: a pickle can name one long text very often.
            if key.len() > MAX_NAME_BYTES || contents.tensors.len() >= MAX_TENSORS {
                header::check_name(self.str(key), contents.tensors.len()).map_err(Error::input)?;
            }
            let name = self.str(key);
            match self.value(*value) {
                Value::Tensor(tensor) => contents.tensors.push((name.into(), (**tensor).clone())),
                Value::Unsupported(what) => return Err(Error::input(*what).tensor(name).help(super::CONVERT)),
                _ => {
                    if contents.others.1.is_empty() {
                        contents.others.1 = name.into();
                    }
                    contents.others.0 += 1;
                }
            }
        }
        Ok(contents)
    }
}

enum Made {
    Value(Value),
    Known(Id),
}

fn empty() -> String {
    "nothing is left on the stack".into()
}

/// The allowed global `module.name`.
fn find(module: &[u8], name: &[u8]) -> Option<Global> {
    Some(match (module, name) {
        (b"collections", b"OrderedDict") => Global::OrderedDict,
        (b"torch._utils", b"_rebuild_tensor") => Global::Tensor(1),
        (b"torch._utils", b"_rebuild_tensor_v2") => Global::Tensor(2),
        (b"torch._utils", b"_rebuild_tensor_v3") => Global::Tensor(3),
        (b"torch._utils", b"_rebuild_parameter" | b"_rebuild_parameter_with_state") => Global::Parameter,
        (b"torch._tensor", b"_rebuild_from_type_v2") => Global::FromType,
        (b"torch", b"Tensor") | (b"torch.nn.parameter", b"Parameter") => Global::Class,
        (b"torch", b"Size") => Global::Size,
        (b"torch", b"UntypedStorage") | (b"torch.storage", b"UntypedStorage") => Global::Storage(None),
        (b"numpy.core.multiarray" | b"numpy._core.multiarray", b"scalar")
        | (b"numpy", b"dtype")
        | (b"_codecs", b"encode") => Global::Scalar,
        (b"torch", class) if class.ends_with(b"Storage") => Global::Storage(Some(storage(class)?)),
        (b"torch", word) => Global::Dtype(dtype(word)?),
        _ => return None,
    })
}

/// The element type of a class of storages.
fn storage(class: &[u8]) -> Option<Dtype> {
    Some(match class {
        b"DoubleStorage" => Dtype::F64,
        b"FloatStorage" => Dtype::F32,
        b"HalfStorage" => Dtype::F16,
        b"BFloat16Storage" => Dtype::BF16,
        b"LongStorage" => Dtype::I64,
        b"IntStorage" => Dtype::I32,
        b"ShortStorage" => Dtype::I16,
        b"CharStorage" => Dtype::I8,
        b"ByteStorage" => Dtype::U8,
        b"BoolStorage" => Dtype::BOOL,
        b"ComplexFloatStorage" => Dtype::C64,
        _ => return None,
    })
}

/// The type called `torch.word`; the inner `None` if safetensors does not have it.
fn dtype(word: &[u8]) -> Option<Option<Dtype>> {
    Some(Some(match word {
        b"float64" => Dtype::F64,
        b"float32" => Dtype::F32,
        b"float16" => Dtype::F16,
        b"bfloat16" => Dtype::BF16,
        b"float8_e4m3fn" => Dtype::F8_E4M3,
        b"float8_e5m2" => Dtype::F8_E5M2,
        b"float8_e8m0fnu" => Dtype::F8_E8M0,
        b"int64" => Dtype::I64,
        b"int32" => Dtype::I32,
        b"int16" => Dtype::I16,
        b"int8" => Dtype::I8,
        b"uint8" => Dtype::U8,
        b"uint16" => Dtype::U16,
        b"uint32" => Dtype::U32,
        b"uint64" => Dtype::U64,
        b"bool" => Dtype::BOOL,
        b"complex64" => Dtype::C64,
        b"complex128" | b"float8_e4m3fnuz" | b"float8_e5m2fnuz" => return Some(None),
        _ => return None,
    }))
}
