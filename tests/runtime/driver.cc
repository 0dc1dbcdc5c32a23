// Runs models through the C interface, for sanitizers and for emulated processors:
//
//     driver FILE...               compares results, and refuses damage
//     driver --mutants N FILE...   runs N damaged copies of each file, or refuses them
//
// FILE: a bipft_architecture, an int32 number of tensors, and of each tensor an int32 length and
// its name, an int64 number of bytes and its bytes. Prints a line for each file with a digest of
// its hidden states. Exits with 1 and a line where results differ between instruction sets or
// numbers of threads, or where damage is not noticed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "bipft_runtime.h"

namespace {

struct Loaded {
  bipft_architecture shape;
  std::vector<std::string> names;
  std::vector<std::unique_ptr<char[]>> data;  // exactly as long as the tensor
  std::vector<bipft_tensor> tensors;
};

template <class T>
T number(std::istream& in) {
  T value;
  in.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

Loaded load(const char* path) {
  std::ifstream in(path, std::ios::binary);
  Loaded model;
  model.shape = number<bipft_architecture>(in);
  const int count = number<int32_t>(in);
  std::vector<uint64_t> sizes;
  for (int i = 0; i < count; i++) {
    std::string name(number<int32_t>(in), ' ');
    in.read(name.data(), name.size());
    model.names.push_back(name);
    sizes.push_back(number<int64_t>(in));
    model.data.emplace_back(new char[sizes.back()]);
    in.read(model.data.back().get(), sizes.back());
  }
  for (int i = 0; i < count; i++)
    model.tensors.push_back({model.names[i].c_str(), model.data[i].get(), sizes[i]});
  return model;
}

void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

bipft_model* make(const Loaded& model, const char* set, std::string* error = nullptr) {
  char message[200] = "";
  bipft_model* made = bipft_new(&model.shape, model.tensors.data(), (int)model.tensors.size(), set,
                                message, sizeof message);
  if (error) *error = message;
  if (!made && !error) fail(message);
  return made;
}

std::vector<float> outputs(bipft_model* model, const bipft_architecture& shape, int tokens,
                           int threads) {
  std::vector<int32_t> ids(tokens), segments(tokens);
  for (int i = 0; i < tokens; i++) {
    ids[i] = i * 37 % shape.vocab_size;
    segments[i] = i % shape.segment_types;
  }
  std::vector<float> out((size_t)(tokens + 1) * shape.hidden);
  char message[200];
  if (bipft_encode(model, ids.data(), segments.data(), tokens, threads, out.data(),
                   out.data() + (size_t)tokens * shape.hidden, message, sizeof message))
    fail(message);
  return out;
}

// Returns a digest (FNV-1a) of all hidden states: pooled vectors depend on the system's tanh.
uint64_t check_results(const Loaded& model, const std::vector<std::string>& sets) {
  const int counts[] = {1, 70, 9, model.shape.max_positions, 3};
  std::map<int, std::vector<float>> expected;  // by the number of tokens
  for (const std::string& set : sets) {
    bipft_model* made = make(model, set.c_str());
    for (int threads : {1, 2, 1, 3})
      for (int count : counts) {
        const std::vector<float> ours = outputs(made, model.shape, count, threads);
        const std::vector<float>& theirs = expected.emplace(count, ours).first->second;
        if (std::memcmp(ours.data(), theirs.data(), ours.size() * sizeof(float)))
          fail(set + " differs with " + std::to_string(threads) + " threads, " +
               std::to_string(count) + " tokens");
      }
    bipft_delete(made);
  }
  uint64_t digest = 0xcbf29ce484222325u;
  for (const auto& [count, out] : expected) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(out.data());
    for (size_t i = 0; i < (size_t)count * model.shape.hidden * sizeof(float); i++)
      digest = (digest ^ bytes[i]) * 0x100000001b3u;
  }
  return digest;
}

// A tensor that is shorter than the architecture says, or missing, is named.
void check_damage(Loaded& model, const std::vector<std::string>& sets) {
  for (bipft_tensor& tensor : model.tensors) {
    if (std::strstr(tensor.name, ".zeros")) continue;
    const bipft_tensor whole = tensor;
    std::string error;
    tensor.bytes -= 1;
    if (make(model, sets[0].c_str(), &error) || error.find(whole.name) == std::string::npos)
      fail(std::string(whole.name) + ": shorter, and not noticed");
    tensor = whole;
    // Missing shifts are those of a recipe without them, missing scales are.
    if (std::strstr(tensor.name, "input_shift")) continue;
    tensor.name = "other";
    if (make(model, sets[0].c_str(), &error) || error.find(whole.name) == std::string::npos)
      fail(std::string(whole.name) + ": missing, and not noticed");
    tensor = whole;
  }
  const bipft_architecture whole = model.shape;
  for (int32_t* field : {&model.shape.hidden, &model.shape.layers, &model.shape.heads,
                         &model.shape.max_positions, &model.shape.intermediate})
    for (int32_t value : {0, -1, 7, 1 << 24, INT32_MAX}) {
      std::string error;
      *field = value;
      if (make(model, sets[0].c_str(), &error))
        fail("a dimension of " + std::to_string(value) + " is not noticed");
      model.shape = whole;
    }
}

// Changes up to four of: a byte or eight of a tensor, its length (less, so that all bytes exist), its
// name, a field of the architecture. What is still accepted must run, whatever it computes.
int run_mutants(Loaded& model, const std::vector<std::string>& sets, int mutants) {
  std::mt19937_64 random(1);
  const auto below = [&](uint64_t n) { return random() % n; };
  const bipft_architecture shape = model.shape;
  int accepted = 0;
  for (int number = 0; number < mutants; number++) {
    const std::vector<bipft_tensor> whole = model.tensors;
    std::vector<std::pair<int, std::string>> contents;  // of changed tensors, to put back
    for (uint64_t changes = 1 + below(4); changes > 0; changes--) {
      const int at = (int)below(whole.size());
      bipft_tensor& tensor = model.tensors[at];
      char* data = model.data[at].get();
      const uint64_t bytes = whole[at].bytes;
      switch (below(8)) {
        case 0:
          tensor.bytes = below(bytes);
          break;
        case 1:
          tensor.name = whole[below(whole.size())].name;
          break;
        case 2: {
          int32_t* fields = reinterpret_cast<int32_t*>(&model.shape);
          int32_t& field = fields[below(sizeof model.shape / sizeof *fields)];
          field = below(2) ? field + (int32_t)below(5) - 2 : (int32_t)random();
          break;
        }
        default: {
          contents.emplace_back(at, std::string(data, bytes));
          const uint64_t width = bytes < 8 || below(2) ? 1 : 8, place = below(bytes - width + 1);
          const uint64_t value = below(4) ? random() : ~(uint64_t)0;
          std::memcpy(data + place, &value, width);
        }
      }
    }
    std::string error;
    if (bipft_model* made = make(model, sets[number % sets.size()].c_str(), &error)) {
      accepted++;
      outputs(made, model.shape, std::min(model.shape.max_positions, 9), 1 + number % 2);
      bipft_delete(made);
    } else if (error.empty()) {
      fail("refused without a message");
    }
    for (auto content = contents.rbegin(); content != contents.rend(); content++)
      std::memcpy(model.data[content->first].get(), content->second.data(),
                  content->second.size());
    model.tensors = whole;
    model.shape = shape;
  }
  return accepted;
}

}  // namespace

int main(int count, char** files) {
  int mutants = 0, first = 1;
  if (count > 2 && !std::strcmp(files[1], "--mutants")) {
    mutants = std::atoi(files[2]);
    first = 3;
  }
  std::vector<std::string> sets;
  std::istringstream names(bipft_instruction_sets());
  for (std::string name; std::getline(names, name, ',');) sets.push_back(name);
  for (int i = first; i < count; i++) {
    Loaded model = load(files[i]);
    if (mutants) {
      std::printf("%s: %d of %d accepted\n", files[i], run_mutants(model, sets, mutants), mutants);
      continue;
    }
    const uint64_t digest = check_results(model, sets);
    check_damage(model, sets);
    std::printf("%s: %016llx\n", files[i], (unsigned long long)digest);
  }
}
