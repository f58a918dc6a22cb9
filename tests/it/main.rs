//! Integration tests: the `tiesmith` binary, used as a person uses it, against independent expectations.
//!
//! | module | what it holds the program to |
//! |---|---|
//! | `adapters` | PEFT adapters as inputs, against PEFT and against models merged by hand |
//! | `methods` | every option against the oracle, bit for bit |
//! | `downloads` | what is downloaded of statistics, signs and adapters, as the plan says |
//! | `draws` | methods that draw at random: distribution and repetition |
//! | `merges` | every method against a reference in f64 and against mergekit |
//! | `mergekit` | its outputs on a family with massive ties |
//! | `determinism` | bytes do not depend on threads, memory, input mode or layout |
//! | `factors` | merged changes of adapters against the best approximation of their rank |
//! | `forms` | every form of the recipe language, right and wrong |
//! | `fisher` | Fisher-weighted averages |
//! | `formats` | stored types and every way to name a checkpoint |
//! | `handing` | shards that a command takes away while the merge goes on |
//! | `golden` | outputs of the paper's own code and of mergekit |
//! | `digits` | accuracies of a real, tiny family |
//! | `analyze` | every number of a report against its definition |
//! | `far` | looks at models on the network: downloaded once |
//! | `hostile` | what stands beside the weights, and where outputs go: as in `corpus` |
//! | `bad_input` | one line, exit code 2, nothing written |
//! | `cli` | verbs, help, reports, exit codes |
//! | `messages` | what is said where something odd is in the place of a file, and which exit code says that repeating helps |
//! | `page` | the page of a report in a browser, where one is asked for |
//! | `perturb` | signs flipped where they should be, and nowhere else |
//! | `properties` | what must hold for every method of the registry |
//! | `packed` | packed task vectors: there and back, as inputs, damaged |
//! | `modules` | models that are merged part by part |
//! | `output` | the files of a finished output |
//! | `parts` | merges in parts, on many machines |
//! | `remote` | inputs from the Hub and from web servers, with every fault |
//! | `long_tensors` | tensors too long for memory are downloaded once |
//! | `limits` | limits of the system: files, memory, names |
//! | `resume` | what becomes of an unfinished output |
//! | `repair` | a manifest makes its output again, and its damaged files |
//! | `spool` | what is downloaded once and needed twice |
//! | `sweep` | grids of merges, against merges |
//! | `torch` | PyTorch checkpoints as inputs |
//! | `verify` | damage to a finished output is found and named |
//! | `regmean` | regression means of linear layers |
//! | `recipes` | recipe files, against the outputs of mergekit and against flags |
//! | `vocabulary` | tokenizers and rows of embeddings that are brought together |

mod support;

mod adapters;
mod analyze;
mod bad_input;
mod cli;
mod corpus;
mod determinism;
mod digits;
mod downloads;
mod draws;
mod factors;
mod far;
mod fisher;
mod formats;
mod forms;
mod golden;
mod guesses;
mod handing;
mod hostile;
mod limits;
mod long_tensors;
mod mergekit;
mod merges;
mod messages;
mod methods;
mod modules;
mod output;
mod packed;
mod page;
mod parts;
mod perturb;
mod properties;
mod recipes;
mod regmean;
mod remote;
mod repair;
mod resume;
mod spool;
mod sweep;
mod torch;
mod verify;
mod vocabulary;
