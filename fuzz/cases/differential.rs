//! Bytes as the JSON of a header, with data as long as it says: our reader and the reference agree on every tensor, or
//! ours refuses for one of the reasons that are listed here.

use tiesmith::Checkpoint;

/// What we refuse although the reference accepts it.
const STRICTER: [&str; 6] = ["twice", "duplicate", "dimensions", "the name has", "does not begin with `{`", "at most"];
/// Longest data that is made up.
const MOST_BYTES: usize = 1 << 16;

/// See the file's documentation.
pub fn run(data: &[u8]) {
    // The largest number in the text that can be the end of the data.
    let text = String::from_utf8_lossy(data);
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse::<usize>().ok());
    let mut lengths: Vec<usize> = numbers.filter(|&length| length <= MOST_BYTES).chain([0]).collect();
    lengths.sort_unstable();
    lengths.dedup();
    for length in lengths.into_iter().rev().take(3) {
        let bytes = [&(data.len() as u64).to_le_bytes()[..], data, &vec![0; length]].concat();
        compare(&bytes);
    }
}

fn compare(bytes: &[u8]) {
    let files = super::Files::new("differential");
    let ours = Checkpoint::open(&files.put("model.safetensors", bytes), &files.storage);
    let (reference, ours) = match (safetensors::SafeTensors::deserialize(bytes), ours) {
        (Ok(reference), Ok(ours)) => (reference, ours),
        (Err(error), Ok(_)) => panic!("accepted what the reference refuses: {error:?}"),
        (Ok(reference), Err(error)) => {
            super::refused(&error);
            // Of a name that is there twice the reference takes the last, whatever the others say.
            let twice = String::from_utf8_lossy(bytes).matches("dtype").count() != reference.len();
            let known = STRICTER.iter().any(|reason| error.to_string().contains(reason));
            assert!(twice || known, "refused for another reason: {error}");
            return;
        }
        (Err(_), Err(error)) => return super::refused(&error),
    };
    assert_eq!(reference.len(), ours.tensors.len());
    let data = 8 + u64::from_le_bytes(*bytes.first_chunk().expect("a prefix")) as usize;
    for tensor in &ours.tensors {
        let view = reference.tensor(&tensor.name).expect("the reference has it too");
        let shape: Vec<u64> = view.shape().iter().map(|&n| n as u64).collect();
        assert_eq!((view.dtype(), &shape[..]), (tensor.dtype, &*tensor.shape), "{}", tensor.name);
        let at = tensor.offset as usize;
        assert!(at >= data && std::ptr::eq(view.data(), &bytes[at..at + tensor.bytes as usize]), "{}", tensor.name);
    }
}
